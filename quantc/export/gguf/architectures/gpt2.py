"""GPT-2: learned positions, LayerNorm, and weights that the model keeps as (K, N)."""

from __future__ import annotations

from typing import Any

from .base import Architecture, Entry, Settings, Tensor, check_equal, same_name

BLOCK: tuple[tuple[str, Entry], ...] = (
    ("ln_1", "attn_norm"),
    ("attn.c_attn", Tensor("attn_qkv", transposed=True)),
    ("attn.c_proj", Tensor("attn_output", transposed=True)),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", Tensor("ffn_up", transposed=True)),
    ("mlp.c_proj", Tensor("ffn_down", transposed=True)),
)
OUTSIDE: dict[str, Entry] = {
    "transformer.wte": "token_embd",
    "transformer.wpe": Tensor("position_embd", floats=True),
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    return {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        "vocab_size": config.vocab_size,
    }


def check(config: Any) -> None:
    """Raise ModelError for settings that llama.cpp computes otherwise."""
    check_equal(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)


GPT2 = Architecture(
    name="gpt2",
    model_types=("gpt2",),
    tensors=OUTSIDE | same_name(BLOCK, "transformer.h.{}."),
    settings=settings,
    check=check,
    activations=("gelu_new", "gelu_pytorch_tanh"),
)
