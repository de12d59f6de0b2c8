"""Runtimes that load checkpoints after an export, and what they ask of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import QuantSpec


@dataclass(frozen=True)
class Runtime:
    """fused: linears that read the same activation, and all experts of a block, are stored alike.

    bits, groups: what its kernels multiply; -1 is a whole row. Groups run along inputs; nothing is rotated online.
    """

    fused: bool
    bits: tuple[int, ...]
    groups: tuple[int, ...]

    def formats(self, symmetric: bool) -> tuple[str, ...]:
        """Labels of the specs it takes."""
        return tuple(QuantSpec(b, g, symmetric=symmetric).label() for b in self.bits for g in self.groups)


# vLLM's Marlin kernels; siblings of other widths fail to load or give garbage (vllm#50214, intel/auto-round#2174).
RUNTIMES = {"vllm": Runtime(fused=True, bits=(4, 8), groups=(32, 64, 128, -1))}
