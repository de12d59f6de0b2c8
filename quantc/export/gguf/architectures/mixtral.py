"""Mixtral: Llama with routed experts, under Llama's name."""

from __future__ import annotations

from typing import Any

from .base import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    ROTARY_NEIGHBOURS,
    Architecture,
    Settings,
    decoder_settings,
    expert_settings,
    same_name,
)


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    return decoder_settings(config) | expert_settings(config)


MIXTRAL = Architecture(
    name="llama",
    model_types=("mixtral",),
    tensors=EMBEDDING | same_name((*ATTENTION, *ROTARY_NEIGHBOURS, *EXPERTS)),
    settings=settings,
)
