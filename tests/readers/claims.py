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
    several: whether it reads several widths where the target has them. experts: the models with experts that it reads.
    """

    reader: str
    target: str
    error: float
    several: bool = True
    experts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.target} by {self.reader}"


# The arithmetic of readers: up to 3e-3 on tiny models and 5.5e-3 on SmolLM2 in float16, 1.3e-2 and 1.5e-2 where a 4-bit
# kernel has scales and products in bfloat16. A zero point that is off by one gives 0.09 at 8 bits, and more below.
FLOAT16, BFLOAT16 = 1e-2, 2.5e-2
CLAIMS = [
    # 1e-6, but zero points are read in float16.
    Claim("transformers with compressed-tensors", "compressed-tensors", 1e-3, experts=("qwen3_moe", "mixtral")),
    Claim("vLLM", "vllm", 1e-5),
    Claim("mlx-lm", "mlx", 1e-5, experts=("qwen3_moe", "mixtral")),
    Claim("mlx-lm", "awq", FLOAT16),
    Claim("transformers with auto-round", "auto-round", FLOAT16, experts=("qwen3_moe",)),
    Claim("GPTQModel", "gptq", FLOAT16, experts=("qwen3_moe",)),
    Claim("GPTQModel", "awq", FLOAT16, experts=("qwen3_moe",)),
    Claim("transformers with GPTQModel", "gptq", BFLOAT16, several=False),
    Claim("transformers with GPTQModel", "awq", BFLOAT16),
]


def cells(claim: Claim) -> Iterator[tuple[str, Settings]]:
    """Yield what a target holds by its line in the table, a name and settings of a checkpoint each.

    Every width with and without zero points, every length of groups, several widths, and packed tables.
    """
    runtime = RUNTIMES[claim.target]
    kinds = {"symmetric": True, **({"zero points": False} if runtime.zeros else {})}
    for bits in runtime.bits:
        for kind, symmetric in kinds.items():
            yield f"{bits} bits, {kind}", {"bits": bits, "symmetric": symmetric}
    for group in set(runtime.groups) - {32}:
        yield f"groups of {group}", {"bits": 4, "symmetric": True, "group_size": group}
    for kind, symmetric in kinds.items():
        if claim.several and runtime.mixed and (symmetric or runtime.mixed_with_zeros):
            widest, narrowest = max(runtime.bits), min(runtime.bits)
            pins = {"*down_proj": narrowest, "*o_proj": narrowest}
            yield f"several widths, {kind}", {"bits": widest, "symmetric": symmetric, "pins": pins}
    if runtime.tables:
        yield "packed tables", {"bits": 4, "symmetric": True, "head_bits": 8}


def expert_cells(claim: Claim) -> Iterator[tuple[str, Settings]]:
    """Yield how models with experts are stored: all alike, and where the target holds that, the experts otherwise."""
    yield "alike", {"bits": 4, "symmetric": True}
    if claim.several and RUNTIMES[claim.target].mixed:
        yield "narrow experts", {"bits": 8, "symmetric": True, "pins": {"*experts*": 4}}
