"""Which reader is held to which target, and what the table of targets says that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantc.planning.targets import RUNTIMES

Settings = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """What a reader is asked to read.

    error: the most by which its logits may differ, relative to quantc's in float32; the reader's own arithmetic.
    """

    reader: str
    target: str
    error: float

    def __str__(self) -> str:
        return f"{self.target} by {self.reader}"


CLAIMS = [
    Claim("mlx", "mlx", 1e-5),
    Claim("mlx", "awq", 2e-2),  # computes in the float16 of AWQ's scales
    Claim("auto-round", "auto-round", 5e-3),  # computes in float16
]


def cells(target: str) -> Iterator[tuple[str, Settings]]:
    """Yield what a target holds by its line in the table, a name and settings of a checkpoint each: every width with
    and without zero points, every length of groups, several widths, and packed tables."""
    runtime = RUNTIMES[target]
    kinds = {"symmetric": True, **({"zero points": False} if runtime.zeros else {})}
    for bits in runtime.bits:
        for kind, symmetric in kinds.items():
            yield f"{bits} bits, {kind}", {"bits": bits, "symmetric": symmetric}
    for group in set(runtime.groups) - {32}:
        yield f"groups of {group}", {"bits": 4, "symmetric": True, "group_size": group}
    for kind, symmetric in kinds.items():
        if runtime.mixed and (symmetric or runtime.mixed_with_zeros):
            widest, narrowest = max(runtime.bits), min(runtime.bits)
            pins = {"*down_proj": narrowest, "*o_proj": narrowest}
            yield f"several widths, {kind}", {"bits": widest, "symmetric": symmetric, "pins": pins}
    if runtime.tables:
        yield "packed tables", {"bits": 4, "symmetric": True, "head_bits": 8}
