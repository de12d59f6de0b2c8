"""Llama, and what is built like it: Mistral, SmolLM, TinyLlama, Yi."""

from __future__ import annotations

import math
from typing import Any

import torch

from .base import (
    ATTENTION,
    EMBEDDING,
    FEED_FORWARD,
    ROTARY_NEIGHBOURS,
    Architecture,
    decoder_settings,
    full_rope,
    head_width,
    same_name,
)


def rope_factors(config: Any) -> dict[str, torch.Tensor]:
    """Return the tensor of Llama 3's rope scaling: what each pair's wavelength is multiplied with."""
    rope = full_rope(config)
    if rope.get("rope_type") != "llama3":
        return {}
    width, original = head_width(config), rope["original_max_position_embeddings"]
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    turns = original * frequencies / (2 * math.pi)  # within the context that the model was first trained for
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}


LLAMA = Architecture(
    name="llama",
    model_types=("llama", "mistral"),
    tensors=EMBEDDING | same_name((*ATTENTION, *ROTARY_NEIGHBOURS, *FEED_FORWARD)),
    settings=decoder_settings,
    extra=rope_factors,
    ropes=("default", "linear", "yarn", "llama3"),
)
