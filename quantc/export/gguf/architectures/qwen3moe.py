"""Qwen3 with routed experts in every block."""

from __future__ import annotations

from typing import Any

from .base import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    HEAD_NORMS,
    Architecture,
    Settings,
    check_equal,
    decoder_settings,
    expert_settings,
    same_name,
)


def settings(config: Any) -> Settings:
    """Return the hyper-parameters of a config."""
    experts = expert_settings(config) | {"expert_feed_forward_length": config.moe_intermediate_size}
    return decoder_settings(config) | experts


def check(config: Any) -> None:
    """Raise ModelError for experts in some blocks only, and for weights of experts that do not add up to one."""
    check_equal(config, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])


QWEN3_MOE = Architecture(
    name="qwen3moe",
    model_types=("qwen3_moe",),
    tensors=EMBEDDING | same_name((*ATTENTION, *HEAD_NORMS, *EXPERTS)),
    settings=settings,
    check=check,
)
