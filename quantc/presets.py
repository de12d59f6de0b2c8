"""Presets: recipes with names. `quantc recipe show NAME` prints one; docs/results.md has the figures behind them."""

from __future__ import annotations

from difflib import get_close_matches

from .errors import UsageError
from .pipeline import REGISTRY
from .recipe import DEFAULT, CalibrationConfig, Recipe


def _recipe(*passes: str, **settings: dict[str, float]) -> Recipe:
    recipe = Recipe(CalibrationConfig(), tuple((name, REGISTRY[name].Config()) for name in passes))
    return recipe.with_settings(**settings)


# fast: error feedback, and nothing to compute beside the weights at inference. balanced: inputs are rotated where that
# pays, at the cost of a Hadamard transform for each activation. best: the same cost at inference, and about ten times
# the CPU seconds to quantize, most of them to train. `importance` is in none: twice the time for no sure gain.
PRESETS: dict[str, Recipe] = {
    "fast": DEFAULT,
    "balanced": _recipe("allocate", "rotate", "quantize", quantize={"shrink": 0.3}),
    "best": _recipe(
        *("allocate", "scale", "rotate", "quantize", "tune", "distill"),
        quantize={"shrink": 0.3, "rounds": 2, "correct": 0.5},
        tune={"steps": 20},
    ),
}


def preset(name: str) -> Recipe:
    """The recipe of this name; raises UsageError with the nearest known name."""
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise UsageError(f"there is no preset {name!r}; did you mean {near[0]!r}? Known are {', '.join(PRESETS)}.")
    return PRESETS[name]
