"""Tiny randomly initialised vision-language models of transformers: a tower for images and a text decoder.

A family is a model type with the settings of its two parts. Towers have more layers than decoders, so that most of
the weights of some of these models are outside the decoder. `inputs(name)` makes a batch with one image each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.families import VOCAB, randomize

Settings = dict[str, Any]
IMAGE_TOKEN = VOCAB - 1
TEXT: Settings = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
VISION: Settings = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
GRID: Settings = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
MROPE: Settings = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class VisionFamily:
    """Settings of one tiny model: of its text part, its vision part and the whole; image: the rest of an input.

    image_tokens: how many tokens stand for an image. pixels: shape of `pixel_values` of a batch of two.
    """

    model_type: str
    text: Settings
    vision: Settings
    pixels: tuple[int, ...]
    image_tokens: int
    whole: Settings = field(default_factory=dict)
    image: Settings = field(default_factory=dict)


PLAIN = (2, 3, 16, 16)
PATCHES = (32, 3 * 2 * 4 * 4)  # of two images of 4 by 4 patches, each of two frames
LLAMA: Settings = {"model_type": "llama", **TEXT}
QWEN2: Settings = {"model_type": "qwen2", **TEXT}
FOLDED: Settings = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}

VISION_FAMILIES = {
    "llava": VisionFamily(
        "llava", LLAMA, {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 10}, PLAIN, 16,
        {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1},
    ),
    "qwen2_5_vl": VisionFamily(
        "qwen2_5_vl", {**TEXT, "rope_parameters": MROPE},
        {**FOLDED, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
         "fullatt_block_indexes": [1]},
        PATCHES, 4, {"image_token_id": IMAGE_TOKEN}, GRID,
    ),
    "qwen3_vl": VisionFamily(
        "qwen3_vl", {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {**FOLDED, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [0, 1]},
        PATCHES, 4, {"image_token_id": IMAGE_TOKEN}, GRID,
    ),
    "mistral3": VisionFamily(
        "mistral3", {"model_type": "mistral", "head_dim": 16, **TEXT},
        {"model_type": "pixtral", "head_dim": 8, **VISION}, PLAIN, 4,
        {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1, "spatial_merge_size": 2},
        {"image_sizes": torch.tensor([[16, 16]] * 2)},
    ),
    "idefics3": VisionFamily(
        "idefics3", LLAMA, VISION, (2, 1, 3, 16, 16), 4, {"image_token_id": IMAGE_TOKEN, "scale_factor": 2},
    ),
    "paligemma": VisionFamily(
        "paligemma", {"model_type": "gemma", "head_dim": 16, **TEXT, "tie_word_embeddings": True},
        {"model_type": "siglip_vision_model", "projection_dim": 64, "vision_use_head": False, **VISION}, PLAIN, 16,
        {"image_token_id": IMAGE_TOKEN, "projection_dim": 64, "hidden_size": 64, "tie_word_embeddings": True},
        {"token_type_ids": None},
    ),
    "internvl": VisionFamily(
        "internvl", QWEN2, {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}, PLAIN, 4,
        {"image_token_id": IMAGE_TOKEN, "downsample_ratio": 0.5},
    ),
}  # fmt: skip


def build_vision(name: str, seed: int = 0) -> PreTrainedModel:
    """The family's model in float32 and eval mode, the same for the same seed; noise is added to every parameter."""
    family = VISION_FAMILIES[name]
    settings: Settings = {"tie_word_embeddings": False, **family.whole}
    config = AutoConfig.for_model(family.model_type, text_config=family.text, vision_config=family.vision, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


def image_inputs(name: str) -> Settings:
    """Two samples of an image and twelve words each, as keyword arguments of the model."""
    family = VISION_FAMILIES[name]
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, IMAGE_TOKEN, (2, 12), generator=generator)
    tokens = torch.cat([torch.full((2, family.image_tokens), IMAGE_TOKEN), words], 1)
    found: Settings = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **family.image}
    found["pixel_values"] = torch.randn(family.pixels, generator=generator)
    is_image = (tokens == IMAGE_TOKEN).long()
    if "token_type_ids" in found:
        found["token_type_ids"] = 1 - is_image
    if "image_grid_thw" in found:
        found["mm_token_type_ids"] = is_image
    return found
