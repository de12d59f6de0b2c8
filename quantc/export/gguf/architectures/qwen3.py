"""Qwen3: norms on the heads of queries and keys."""

from .base import ATTENTION, EMBEDDING, FEED_FORWARD, HEAD_NORMS, Architecture, decoder_settings, same_name

QWEN3 = Architecture(
    name="qwen3",
    model_types=("qwen3",),
    tensors=EMBEDDING | same_name((*ATTENTION, *HEAD_NORMS, *FEED_FORWARD)),
    settings=decoder_settings,
)
