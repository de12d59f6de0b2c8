"""Gemma 3, models of text: norms on heads too, and another rotary base inside of windows."""

from __future__ import annotations

from typing import Any

from .base import SLIDING, Architecture, Settings, check_equal, decoder_settings, same_name, unlike, window_period
from .gemma2 import BLOCK, OUTSIDE, check_attention_scale, gain

LARGEST = 62


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    found = decoder_settings(config) | {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": window_period(config),
        "rope.freq_base_swa": float(config.rope_parameters[SLIDING]["rope_theta"]),
    }
    if config.final_logit_softcapping:
        found["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return found


def check(config: Any) -> None:
    """Raise ModelError for settings that llama.cpp computes otherwise."""
    check_attention_scale(config, LARGEST)
    check_equal(config, attn_logit_softcapping=None, use_bidirectional_attention=False)
    if config.rope_parameters[SLIDING].get("rope_type", "default") != "default":
        raise unlike(config, "scaled positions inside of windows:", config.rope_parameters[SLIDING], "plain ones")


GEMMA3 = Architecture(
    name="gemma3",
    model_types=("gemma3_text",),
    tensors=OUTSIDE
    | same_name((*BLOCK, ("self_attn.q_norm", gain("attn_q_norm")), ("self_attn.k_norm", gain("attn_k_norm")))),
    settings=settings,
    check=check,
    activations=("gelu_pytorch_tanh",),
    windows=True,
)
