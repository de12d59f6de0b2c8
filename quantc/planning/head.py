"""How the embedding and the head are stored where no pass says so: in 8 bits, if the blocks have few.

In a small model with a large vocabulary these two are half of the file beside blocks of 4 bits. Rounding them to 8
bits adds 0.1 to 0.5 % to the KL divergence that blocks of 3 and 4 bits cause (benchmarks/results/head_bits.json). Every
bit more of the blocks makes that share about four times as large, so that it would show beside blocks of 6 bits.
"""

from __future__ import annotations

from ..errors import UsageError
from ..pipeline.run import Run
from ..spec import QuantSpec
from .candidates import best_group_size

DEFAULT_BITS = 8
MOST_BLOCK_BITS = 5  # of blocks beside which the default holds


def table_shapes(run: Run) -> dict[str, tuple[int, int]]:
    """Return shapes (V, K) of the embedding and the head, once where they are tied.

    Raises UsageError for one that is no matrix.
    """
    shapes = {name: tuple(run.source.model.get_parameter(name).shape) for name in run.graph.outside_weights}
    for name, shape in shapes.items():
        if len(shape) != 2:
            raise UsageError(f"--head-bits cannot quantize {name} of shape {shape}; pass --head-bits keep.")
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def default_specs(run: Run) -> dict[str, QuantSpec]:
    """Return specs of the embedding and the head, in groups that divide their width; none for what is no matrix.

    Codes are symmetric, so that other runtimes hold them exactly (GGUF's Q8_0).
    """
    shapes = {name: run.source.model.get_parameter(name).shape for name in run.graph.outside_weights}
    return {
        name: QuantSpec(DEFAULT_BITS, best_group_size(shape[1]), symmetric=True)
        for name, shape in shapes.items()
        if len(shape) == 2
    }
