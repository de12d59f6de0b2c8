"""Tiny models whose weights fit every container, exported and read by another runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import quantc
from quantc.export.probe import Agreement, logits_of, measure
from tests.helpers import save_with_tokenizer
from tests.quantc.export.tiny import build
from tests.readers import environments

TOKENS = torch.arange(1, 41)
# Rows of whole groups of 128; a rotary base that is no reader's default, so that one who does not find it shows.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
ROPE: dict[str, Any] = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
PLAIN: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
# 64 wide: mlx-lm scales its embedding by the root of the width in bfloat16, which is exact for 8 and not for 11.3.
GEMMA: dict[str, Any] = {
    "rope_parameters": {
        "full_attention": {"rope_theta": 5e4, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 3e3, "rope_type": "default"},
    }
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, **ROPE, **PLAIN},
    "qwen2": {**WIDE, **ROPE},
    "qwen3": {**WIDE, **ROPE},
    "gemma3": GEMMA,
}


def save(name: str, folder: Path) -> Path:
    """Save the model of a name in float32, with its tokenizer."""
    return save_with_tokenizer(build(name, **MODELS[name]), folder)


def exported(model: Path | str, target: str, out: Path, **settings: Any) -> tuple[torch.Tensor, Path]:
    """Quantize a model to nearest and export it; return quantc's logits (T, V) of TOKENS and the new folder."""
    chosen = {"preset": "fast", "method": "rtn", "calib": "none", "group_size": 32, "head_bits": "keep", **settings}
    quantc.quantize(model, out=out / "packed", **chosen)
    quantc.export(out / "packed", to=target, out=out / "folder")
    return logits_of(quantc.load(out / "packed", dtype=torch.float32).eval(), TOKENS), out / "folder"


def agreements(
    reader: str, expected: Mapping[str, tuple[torch.Tensor, Path]]
) -> tuple[dict[str, Agreement], dict[str, str]]:
    """Return by name how a reader's logits agree with quantc's, and what it failed with on other folders."""
    answers = environments.ask(reader, [folder for _, folder in expected.values()], TOKENS)
    found, failed = {}, {}
    for (name, (logits, _)), answer in zip(expected.items(), answers, strict=True):
        if isinstance(answer, str):
            failed[name] = answer
        else:
            found[name] = measure(logits, answer, None)
    return found, failed
