"""A tiny model of six blocks, and copies of it with a weight that something went wrong with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.families import FAMILIES, randomize
from tests.helpers import save_with_tokenizer

BLOCKS = 6


def deep(name: str = "llama", blocks: int = BLOCKS) -> PreTrainedModel:
    """Return a family's model with more blocks than it has elsewhere."""
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, **{**family.settings, "num_hidden_layers": blocks})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


@torch.no_grad()
def spoil(model: PreTrainedModel, name: str, noise: float = 0.1) -> PreTrainedModel:
    """Add noise to a parameter, of the size that its values have by default."""
    weight = model.get_parameter(name)
    weight += noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with a tokenizer and a text of 400 words; returns the folder."""
    return save_with_tokenizer(model, folder)
