"""OLMo 2: norms after attention and feed-forward, and on whole queries and keys."""

from .base import ATTENTION, EMBEDDING, FEED_FORWARD, HEAD_NORMS, Architecture, decoder_settings, same_name

BLOCK = (
    *ATTENTION[1:],
    *HEAD_NORMS,
    ("post_attention_layernorm", "post_attention_norm"),
    *FEED_FORWARD[1:],
    ("post_feedforward_layernorm", "post_ffw_norm"),
)
OLMO2 = Architecture(
    name="olmo2",
    model_types=("olmo2",),
    tensors=EMBEDDING | same_name(BLOCK),
    settings=decoder_settings,
)
