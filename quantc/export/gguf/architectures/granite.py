"""Granite: Llama with multipliers on embedding, residual stream, attention and logits."""

from __future__ import annotations

from typing import Any

from .base import ATTENTION, EMBEDDING, FEED_FORWARD, ROTARY_NEIGHBOURS, Architecture, Settings, same_name
from .base import decoder_settings as shared
from .llama import rope_factors


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    return shared(config) | {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


GRANITE = Architecture(
    name="granite",
    model_types=("granite",),
    tensors=EMBEDDING | same_name((*ATTENTION, *ROTARY_NEIGHBOURS, *FEED_FORWARD)),
    settings=settings,
    extra=rope_factors,
    ropes=("default", "linear", "yarn", "llama3"),
)
