"""Every program that the CUDA kernels use, with its budget: what the tests compile for every architecture."""

from __future__ import annotations

from collections.abc import Callable

from . import gptq, gram, hadamard, kept_launch, packed, trellis_launch, trellis_panel
from .program import Budget, Program

# One function of each launcher module; a new launcher adds its own here.
LAUNCHERS: tuple[Callable[[], dict[Program, Budget]], ...] = (
    gptq.programs,
    gram.programs,
    hadamard.programs,
    kept_launch.programs,
    packed.programs,
    trellis_launch.programs,
    trellis_panel.programs,
)


def programs() -> dict[Program, Budget]:
    """Return the variants of all launchers."""
    return {program: budget for variants in LAUNCHERS for program, budget in variants().items()}
