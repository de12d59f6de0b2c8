"""What a width means for a weight of a shape: groups on the uniform grid, or blocks of a target's own grids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from ..graph.model_graph import Linear
from ..pipeline.run import Run
from ..spec import MIN_BITS, MOST_TRELLIS_BITS, QuantSpec, ScaleDtype, Trellis, Uniform, trellis_spec
from ..units import plural
from . import candidates
from .candidates import DEFAULT_GROUP, best_group_size
from .settings import AllocateConfig
from .targets import Runtime

LARGE_BLOCK = 256  # weights of the block types with sub-scales

Shape = tuple[int, int]


class Grids(ABC):
    """The grids that weights (N, K) are rounded on."""

    @abstractmethod
    def of_width(self, bits: int, shape: Shape) -> QuantSpec | None:
        """Return what a weight is stored as in a number of bits; None where no block divides its rows."""

    @abstractmethod
    def of_head(self, bits: int, shape: Shape) -> QuantSpec | None:
        """Return the same of an embedding or a head for which settings say nothing."""

    def of_table_width(self, bits: int, shape: Shape) -> QuantSpec | None:
        """Return what an embedding or a head is stored as in a number of bits."""
        return self.of_width(bits, shape)

    @abstractmethod
    def with_bits(self, bits: int, planned: QuantSpec | None, shape: Shape) -> QuantSpec | None:
        """Return the same of a weight for which something else is planned; None: nothing is yet."""

    @abstractmethod
    def of_linear(self, linear: Linear, planned: QuantSpec) -> list[QuantSpec]:
        """Return the candidates of a linear within a budget."""

    @abstractmethod
    def of_table(self, shape: Shape) -> list[QuantSpec]:
        """Return the candidates of an embedding or a head within a budget."""

    @abstractmethod
    def notes(self, run: Run) -> list[str]:
        """Return what the widths of a model change in a plan without a budget."""


class UniformGrid(Grids):
    """The uniform grid, in groups of the size that settings say, or of one that divides the width."""

    def __init__(self, config: AllocateConfig, scale_dtype: ScaleDtype):
        self._config, self._scale_dtype = config, scale_dtype

    def of_width(self, bits: int, shape: Shape) -> QuantSpec:
        config = self._config
        along = shape[1] if config.grouping == "per_oc" else shape[0]
        group = self._group(along) if config.group_size is None else config.group_size
        return QuantSpec(bits, group, config.grouping, config.symmetric, scale_dtype=self._scale_dtype)

    def _group(self, width: int) -> int:
        """Return the size of groups that suits a width, of those that the target holds where there is one."""
        runtime = self._config.runtime
        held = None if runtime is None else runtime.group_of(width)
        return best_group_size(width) if held is None else held

    def of_head(self, bits: int, shape: Shape) -> QuantSpec:
        # symmetric codes, so that other runtimes hold them exactly (GGUF's Q8_0)
        return QuantSpec(bits, best_group_size(shape[1]), symmetric=True, scale_dtype=self._scale_dtype)

    def with_bits(self, bits: int, planned: QuantSpec | None, shape: Shape) -> QuantSpec:
        return self.of_width(bits, shape) if planned is None else replace(planned, bits=bits)

    def of_linear(self, linear: Linear, planned: QuantSpec) -> list[QuantSpec]:
        config = self._config
        found = candidates.of_linear(planned, linear, config.any_group, sparse=config.sparsity is not None)
        return [*found, *candidates.of_labels(config.labels, planned, linear.shape)]

    def of_table(self, shape: Shape) -> list[QuantSpec]:
        spec = UniformGrid.of_width(self, self._config.bits, shape)
        return candidates.of_table(spec, shape, self._config.any_group)

    def notes(self, run: Run) -> list[str]:
        sizes = {spec.group_size for spec in run.plan.specs.values() if spec is not None and spec.code == Uniform.name}
        if not self._config.any_group or not sizes - {DEFAULT_GROUP}:
            return []
        found = ", ".join(str(size) for size in sorted(sizes))
        return [f"group sizes {found}: {DEFAULT_GROUP} does not divide every width of this model"]


class TrellisGrids(UniformGrid):
    """Trellis codes for linears, in as many bits as they have, and the uniform grid for all else."""

    def of_width(self, bits: int, shape: Shape) -> QuantSpec:
        return trellis_spec(bits) if bits <= MOST_TRELLIS_BITS else super().of_width(bits, shape)

    def of_table_width(self, bits: int, shape: Shape) -> QuantSpec:
        return super().of_width(bits, shape)

    def instead(self, planned: QuantSpec, shape: Shape) -> QuantSpec:
        """Return what a linear planned in trellis codes has on the uniform grid."""
        spec = super().of_width(max(planned.bits, MIN_BITS), shape)
        return replace(spec, hadamard=planned.hadamard, rank=planned.rank)

    def with_bits(self, bits: int, planned: QuantSpec | None, shape: Shape) -> QuantSpec:
        if planned is None:
            return self.of_table_width(bits, shape)
        return replace(self.of_width(bits, shape), hadamard=planned.hadamard, rank=planned.rank)

    def of_linear(self, linear: Linear, planned: QuantSpec) -> list[QuantSpec]:
        found = [self.with_bits(bits, planned, linear.shape) for bits in candidates.TRELLIS_BITS]
        uniform = super().of_linear(linear, self.instead(planned, linear.shape))
        if self._config.code == Trellis.name:
            uniform = [spec for spec in uniform if spec.bits > MOST_TRELLIS_BITS and not spec.sparse]
        return [*found, *uniform]


class TargetGrids(Grids):
    """A target's own grids, whose blocks have sizes of their own."""

    def __init__(self, runtime: Runtime):
        self._runtime = runtime

    def of_width(self, bits: int, shape: Shape) -> QuantSpec | None:
        return self._runtime.of_width(bits, shape)

    def of_head(self, bits: int, shape: Shape) -> QuantSpec | None:
        return self.of_width(bits, shape)

    def with_bits(self, bits: int, planned: QuantSpec | None, shape: Shape) -> QuantSpec | None:
        return self.of_width(bits, shape)

    def of_linear(self, linear: Linear, planned: QuantSpec) -> list[QuantSpec]:
        return self._runtime.candidates(linear.shape)

    def of_table(self, shape: Shape) -> list[QuantSpec]:
        return self._runtime.candidates(shape)

    def notes(self, run: Run) -> list[str]:
        """Say where rows are too short for the blocks of the others, as llama.cpp's quantizer does in silence."""
        specs, linears, found = run.plan.specs, run.graph.linears, []
        blocks = {spec.group_size for spec in specs.values() if spec is not None}
        uneven = [name for name, linear in linears.items() if linear.shape[1] % LARGE_BLOCK]
        kept = [name for name in linears if specs[name] is None]
        if uneven and len(uneven) > len(kept) and run.container is None:  # of a file every tensor is known
            layers = plural(len(uneven), "layer")
            found.append(f"blocks of {min(blocks)} in {layers}, whose rows {LARGE_BLOCK} does not divide")
        if kept:
            found.append(f"{plural(len(kept), 'layer')} kept as floats, whose rows no block divides")
        return found
