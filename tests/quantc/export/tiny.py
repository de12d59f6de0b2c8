"""Tiny models of the architectures that quantc writes to GGUF, their rows whole blocks of 32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantc.export.gguf.architectures import architecture_of
from quantc.export.gguf.file import GgufWriter, Metadata
from quantc.export.gguf.layout import FileTensor, ModelTensor, lay_out
from quantc.export.gguf.metadata import describe_model, describe_storage
from quantc.export.gguf.tokenizer import without_tokenizer
from tests.families import FAMILIES, randomize

SHARED: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
GEMMA = {
    **SHARED, "num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "factor": 8.0, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {**ROPE, "rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [1.0 + i for i in range(8)]}  # fmt: skip
# Name -> the family of tests/families.py, and what differs from it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SHARED, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**SHARED, "rope_parameters": LLAMA3, "head_dim": 32}),
    "llama_linear": ("llama", {**SHARED, "rope_parameters": {**ROPE, "factor": 4.0, "rope_type": "linear"}}),
    "mistral": ("mistral", {**SHARED, "sliding_window": None}),
    "mixtral": ("mixtral", SHARED),
    "qwen2": ("qwen2", SHARED),
    "qwen2_yarn": ("qwen2", {**SHARED, "rope_parameters": {**ROPE, "factor": 4.0, "rope_type": "yarn"}}),
    "qwen3": ("qwen3", SHARED),
    "qwen3_moe": ("qwen3_moe", {**SHARED, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "phi3": ("phi3", {**SHARED, "partial_rotary_factor": 1.0}),
    "phi3_long": ("phi3", {**SHARED, "original_max_position_embeddings": 32, "rope_parameters": LONGROPE}),
    "granite": ("granite", {**SHARED, "attention_multiplier": 0.3}),
    "olmo2": ("olmo2", SHARED),
    "gpt2": ("gpt2", {"n_inner": 96}),
}


def build(name: str, **settings: Any) -> PreTrainedModel:
    """The model of a name in float32, the same each time."""
    family, own = MODELS[name]
    config = AutoConfig.for_model(FAMILIES[family].model_type, **{**FAMILIES[family].settings, **own, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


def write_floats(model: PreTrainedModel, file: Path, words: Metadata | None = None) -> list[FileTensor]:
    """Write a model's float32 weights as they are, with a tokenizer or without."""
    weights = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    architecture = architecture_of(model.config)
    shapes = {name: ModelTensor(tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    tensors = lay_out(shapes, architecture, model.config)
    metadata = describe_model(architecture, model.config, "tiny") | describe_storage(tensors)
    metadata |= words or without_tokenizer()
    writer = GgufWriter(file, architecture.name, metadata, tensors)
    for tensor in tensors:
        writer.write([tensor.of_floats(weights[tensor.source]) if tensor.source else tensor.read()])  # type: ignore[misc]
    writer.finish()
    return tensors


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(T, V) of tokens (T,)."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return found
