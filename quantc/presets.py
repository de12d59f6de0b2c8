"""Presets: recipes with names. `quantc recipe show NAME` prints one; docs/results.md has the figures behind them."""

from __future__ import annotations

from difflib import get_close_matches

from .errors import UsageError
from .pipeline import REGISTRY
from .recipe import DEFAULT, CalibrationConfig, Recipe


def _recipe(*passes: str, rounds: int = 0) -> Recipe:
    recipe = Recipe(CalibrationConfig(), tuple((name, REGISTRY[name].Config()) for name in passes))
    return recipe.with_settings(quantize={"rounds": rounds})


# fast: error feedback, and nothing to compute beside the weights at inference. balanced: inputs are rotated where that
# pays, which takes a fifth to a quarter off the KL divergence at 3 bits and costs a Hadamard transform for each
# activation. best: twice the time to quantize, the same cost at inference.
PRESETS: dict[str, Recipe] = {
    "fast": DEFAULT,
    "balanced": _recipe("allocate", "rotate", "quantize"),
    "best": _recipe("allocate", "scale", "rotate", "quantize", rounds=2),
}


def preset(name: str) -> Recipe:
    """The recipe of this name; raises UsageError with the nearest known name."""
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise UsageError(f"there is no preset {name!r}; did you mean {near[0]!r}? Known are {', '.join(PRESETS)}.")
    return PRESETS[name]
