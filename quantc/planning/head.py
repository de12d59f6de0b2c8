"""How the embedding and the head are stored where no pass says so: in 8 bits, if the blocks have few.

In a small model with a large vocabulary these two are half of the file beside blocks of 4 bits. Rounding them to 8
bits adds 0.1 to 0.5 % to the KL divergence that blocks of 3 and 4 bits cause (benchmarks/results/head_bits.json). Every
bit more of the blocks makes that share about four times as large, so that it would show beside blocks of 6 bits.
"""

from __future__ import annotations

from ..errors import UsageError
from ..pipeline.run import Run
from ..spec import QuantSpec
from .budget import Shared
from .formats import Formats
from .grids import Shape
from .settings import AllocateConfig
from .sizes import output_bytes

DEFAULT_BITS = 8
MOST_BLOCK_BITS = 5  # of blocks beside which the default holds


def check_automatic(config: AllocateConfig) -> None:
    """Raise UsageError where widths of the two are to be chosen, and something else does not go with that."""
    if config.head_bits != "auto":
        return
    if config.size is None:
        raise UsageError("--head-bits auto chooses within a size, and there is none; pass --size, or 2 to 8 bits.")
    if config.search:
        raise UsageError("--search looks at the blocks alone, and --head-bits is auto; remove one of them.")
    if config.estimator != "fisher":
        raise UsageError(
            f"--head-bits auto needs the estimator fisher, and the recipe has {config.estimator}; pass 2 to 8 bits."
        )


def head_specs(run: Run, config: AllocateConfig, formats: Formats) -> dict[str, QuantSpec | None]:
    """Return what settings or the default say of the two; nothing where they stay as they are, or a budget chooses."""
    if isinstance(config.head_bits, int):
        bits = config.head_bits
        return {name: formats.grids.of_table_width(bits, shape) for name, shape in table_shapes(run).items()}
    few_bits = config.has_budget or config.bits <= MOST_BLOCK_BITS
    if config.head_bits is None and few_bits and formats.cover_head:
        return {**default_specs(run, formats)}
    return {}


def table_shapes(run: Run) -> dict[str, Shape]:
    """Return shapes (V, K) of the embedding and the head, once where they are tied.

    Raises UsageError for one that is no matrix.
    """
    shapes = _shapes(run)
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise UsageError(f"--head-bits cannot quantize {name} of shape {shape}; pass --head-bits keep.")
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def default_specs(run: Run, formats: Formats) -> dict[str, QuantSpec]:
    """Return the default for the two; none for what is no matrix, or whose rows no block of the formats divides."""
    matrices = {name: (shape[0], shape[1]) for name, shape in _shapes(run).items() if len(shape) == 2}
    found = {name: formats.grids.of_head(DEFAULT_BITS, shape) for name, shape in matrices.items()}
    return {name: spec for name, spec in found.items() if spec is not None}


def keep_where_it_fits(run: Run, config: AllocateConfig, plan: Shared) -> None:
    """Leave a head that only the default would round as it is, where the size allows that beside a budget's plan."""
    kept = dict.fromkeys(name for name in run.plan.specs if name in run.graph.outside_weights)
    specs = {**run.plan.specs, **plan.specs, **kept}
    if config.head_bits is None and (config.size is None or output_bytes(run, specs) <= config.size):
        run.plan.specs.update(kept)


def _shapes(run: Run) -> dict[str, tuple[int, ...]]:
    return {name: tuple(run.source.model.get_parameter(name).shape) for name in run.graph.outside_weights}
