"""Gemma 2: norms before and after, gains stored less one, a window in every other layer."""

from __future__ import annotations

from typing import Any

from .base import Architecture, Entry, Settings, Tensor, decoder_settings, head_width, same_name, unlike, window_period

LARGEST = 46  # layers of the one size whose attention llama.cpp scales by width / heads


def gain(name: str) -> Tensor:
    """Return the entry of a norm: the model multiplies by one more than it stores."""
    return Tensor(name, added=1.0)


BLOCK: tuple[tuple[str, Entry], ...] = (
    ("input_layernorm", gain("attn_norm")),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", gain("post_attention_norm")),
    ("pre_feedforward_layernorm", gain("ffn_norm")),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("post_feedforward_layernorm", gain("post_ffw_norm")),
)
OUTSIDE: dict[str, Entry] = {
    "model.embed_tokens": "token_embd",
    "model.norm": gain("output_norm"),
    "lm_head": "output",
}


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    return decoder_settings(config) | {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": window_period(config),
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def check_attention_scale(config: Any, largest: int) -> None:
    """Raise ModelError where attention is not scaled as llama.cpp scales it, which goes by the number of layers."""
    scale = head_width(config)
    if config.num_hidden_layers == largest:
        scale = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != scale:
        raise unlike(config, "query_pre_attn_scalar", config.query_pre_attn_scalar, scale)


def check(config: Any) -> None:
    """Raise ModelError for settings that llama.cpp computes otherwise."""
    check_attention_scale(config, LARGEST)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, name):
            raise unlike(config, name, getattr(config, name), "a number")


GEMMA2 = Architecture(
    name="gemma2",
    model_types=("gemma2",),
    tensors=OUTSIDE | same_name(BLOCK),
    settings=settings,
    check=check,
    activations=("gelu_pytorch_tanh",),
    windows=True,
)
