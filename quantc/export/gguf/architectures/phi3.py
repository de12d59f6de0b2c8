"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values in one weight, gate and up in another."""

from __future__ import annotations

import math
from typing import Any

import torch

from .base import EMBEDDING, Architecture, Settings, decoder_settings, full_rope, head_width, same_name

BLOCK = (
    ("input_layernorm", "attn_norm"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    rope = full_rope(config)
    found = decoder_settings(config)
    found["rope.dimension_count"] = int(head_width(config) * rope.get("partial_rotary_factor", 1.0))
    original = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
    found["rope.scaling.original_context_length"] = original
    found["attention.sliding_window"] = config.sliding_window or 0
    if rope.get("rope_type") == "longrope":
        longer = config.max_position_embeddings / original
        usual = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
        found |= {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": rope.get("attention_factor") or usual}
    return found


def rope_factors(config: Any) -> dict[str, torch.Tensor]:
    """Return the factors of rotary wavelengths for short and for long texts."""
    rope = full_rope(config)
    if rope.get("rope_type") != "longrope":
        return {}
    return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]).float() for kind in ("long", "short")}


PHI3 = Architecture(
    name="phi3",
    model_types=("phi3",),
    tensors=EMBEDDING | same_name(BLOCK),
    settings=settings,
    extra=rope_factors,
    ropes=("default", "longrope"),
)
