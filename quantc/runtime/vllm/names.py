"""Names of modules where transformers renamed what the original checkpoints of a model have, and vLLM did not."""

from __future__ import annotations

import re

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

LITERAL = re.compile(r"[.\w]+")  # a part of a name, not a pattern for several


def renamed_parts(model_type: str) -> dict[str, str]:
    """Return part of a name in transformers' model -> that part in the original checkpoints, which vLLM knows.

    Only parts inside names: how names start vLLM maps by itself.
    """
    found = {}
    for entry in get_checkpoint_conversion_mapping(model_type) or []:
        if isinstance(entry, WeightRenaming):
            for original, own in zip(entry.source_patterns, entry.target_patterns, strict=True):
                if original.startswith(".") and LITERAL.fullmatch(original) and LITERAL.fullmatch(own):
                    found[own] = original
    return found


def rename(name: str, parts: dict[str, str]) -> str:
    """Return a name with the parts that differ replaced."""
    for own, original in parts.items():
        name = name.replace(own, original, 1)
    return name
