"""Qwen2 and Qwen2.5."""

from .base import ATTENTION, EMBEDDING, FEED_FORWARD, Architecture, decoder_settings, same_name

QWEN2 = Architecture(
    name="qwen2",
    model_types=("qwen2",),
    tensors=EMBEDDING | same_name((*ATTENTION, *FEED_FORWARD)),
    settings=decoder_settings,
)
