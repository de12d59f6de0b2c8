"""Presets: recipes with names. `quantc recipe show NAME` prints one; docs/results.md has the figures behind them."""

from __future__ import annotations

from difflib import get_close_matches

from .errors import UsageError
from .pipeline import REGISTRY
from .recipe import DEFAULT, CalibrationConfig, Recipe


def _recipe(*passes: str, **quantize: float) -> Recipe:
    recipe = Recipe(CalibrationConfig(), tuple((name, REGISTRY[name].Config()) for name in passes))
    return recipe.with_settings(quantize=quantize)


# KL divergence of SmolLM2-135M and stories15M at 3 bits, to that of plain GPTQ, and CPU time to quantize:
# fast 0.89 and 0.92, 1 x: error feedback, and nothing to compute beside the weights at inference. balanced 0.64 and
# 0.76, 1 x: inputs are rotated, a Hadamard transform for each activation. best 0.56 and 0.66, 4 to 5 x: the same cost
# at inference.
PRESETS: dict[str, Recipe] = {
    "fast": DEFAULT,
    "balanced": _recipe("allocate", "rotate", "quantize"),
    "best": _recipe("allocate", "importance", "rotate", "scale", "quantize", rounds=2, correct=0.5),
}


def preset(name: str) -> Recipe:
    """The recipe of this name; raises UsageError with the nearest known name."""
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise UsageError(f"there is no preset {name!r}; did you mean {near[0]!r}? Known are {', '.join(PRESETS)}.")
    return PRESETS[name]
