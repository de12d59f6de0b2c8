"""Runtimes that load checkpoints after an export, and what they ask of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import GRIDS, Fixed, Ggml, QuantSpec


@dataclass(frozen=True)
class Runtime:
    """What a plan for a runtime keeps to. Groups run along inputs, and nothing is rotated online.

    fused: linears that read the same activation, and all experts of a block, are stored alike. bits, groups: what its
    kernels multiply on the uniform grid; -1 is a whole row. codes: the grids that it reads instead, if it does.
    """

    fused: bool
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    codes: tuple[str, ...] = ()

    def formats(self, symmetric: bool) -> tuple[str, ...]:
        """Return the labels of the specs that it loads."""
        if self.codes:
            return tuple(spec_of_code(code).label() for code in self.codes)
        return tuple(QuantSpec(b, g, symmetric=symmetric).label() for b in self.bits for g in self.groups)

    def candidates(self, shape: tuple[int, int]) -> list[QuantSpec]:
        """Return what a weight (N, K) can be stored as on the runtime's own grids."""
        return [spec_of_code(code) for code in self.codes if _grid(code).divides(shape[1])]

    def of_width(self, bits: int, shape: tuple[int, int]) -> QuantSpec | None:
        """Return the smallest of the candidates for a weight (N, K) whose codes have this many bits, or else more;
        of two alike the one with sub-scales. Only a budget chooses codes whose values are not evenly spaced.

        None where no block divides its rows.
        """
        found = [spec for spec in self.candidates(shape) if spec.code in EVEN]
        wide = [spec for spec in found if spec.bits >= bits]
        return min(wide or found, key=lambda spec: (spec.bits, spec.stored_bits(shape), -spec.group_size), default=None)


def spec_of_code(code: str) -> QuantSpec:
    """Return the spec of a code with blocks by its name."""
    grid = _grid(code)
    return QuantSpec(grid.width, grid.block, code=code)


def _grid(code: str) -> type[Fixed]:
    grid = GRIDS[code]
    assert issubclass(grid, Fixed)
    return grid


GGML = {name: grid for name, grid in GRIDS.items() if issubclass(grid, Ggml)}
EVEN = frozenset(name for name, grid in GGML.items() if not grid.table)


RUNTIMES = {
    # vLLM's Marlin kernels; siblings of other widths fail to load or give garbage (vllm#50214, intel/auto-round#2174).
    "vllm": Runtime(fused=True, bits=(4, 8), groups=(32, 64, 128, -1)),
    # llama.cpp: a type for each tensor. MXFP4 too: made for experts, but any tensor may have it.
    "gguf": Runtime(fused=False, codes=(*GGML, "mxfp4")),
}
