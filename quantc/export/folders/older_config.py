"""Settings for readers with model code of their own, which look for them where transformers 4 wrote them.

transformers 5 writes `rope_parameters` and `layer_types`. mlx-lm 0.32 reads `rope_theta` and others beside them, and
takes a default where it finds none, so that the model loads and computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"


def older_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json has to say beside its settings."""
    count = settings.get("num_local_experts")
    experts = {} if count is None else {"num_experts": count}
    return {**_rope(settings.get("rope_parameters")), **_pattern(settings), **experts}


def _rope(parameters: Any) -> dict[str, Any]:
    if not isinstance(parameters, Mapping):
        return {}
    whole = parameters.get(FULL, parameters)
    if "rope_theta" not in whole:
        return {}
    scaling = {key: value for key, value in whole.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    found = {"rope_theta": whole["rope_theta"], "rope_scaling": None if plain else scaling}
    sliding = parameters.get(SLIDING)
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        found["rope_local_base_freq"] = sliding["rope_theta"]
    return found


def _pattern(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return every how many layers one reads all tokens, where layers differ in that and do so regularly."""
    kinds = settings.get("layer_types")
    if "sliding_window_pattern" in settings or not isinstance(kinds, Sequence) or {*kinds} != {SLIDING, FULL}:
        return {}
    every = kinds.index(FULL) + 1
    regular = all((kind == FULL) == (number % every == 0) for number, kind in enumerate(kinds, 1))
    return {"sliding_window_pattern": every} if regular else {}
