"""Tiny models whose weights fit every container, exported and read by another runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import quantc
from quantc.export.probe import logits_of, measure
from quantc.report import Report
from tests.helpers import save_with_tokenizer
from tests.quantc.export.tiny import build
from tests.readers import environments

Expected = tuple[torch.Tensor, Path]
TOKENS = torch.arange(1, 41)
# Rows of whole groups of 128; a rotary base that is no reader's default, so that one who does not find it shows.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
ROPE: dict[str, Any] = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
PLAIN: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
# 64 wide: mlx-lm scales its embedding by the root of the width in bfloat16, which is exact for 8 and not for 11.3.
GEMMA: dict[str, Any] = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "rope_parameters": {
        "full_attention": {"rope_theta": 5e4, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 3e3, "rope_type": "default"},
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, **ROPE, **PLAIN},
    "qwen2": {**WIDE, **ROPE},
    "qwen3": {**WIDE, **ROPE},
    "gemma3": GEMMA,
}
EXPERTS: dict[str, dict[str, Any]] = {"qwen3_moe": {**WIDE, **ROPE}, "mixtral": {**WIDE, **ROPE}}


def save(name: str, folder: Path, differs: dict[str, Any] | None = None) -> Path:
    """Save the model of a name in float32, with its tokenizer. differs: settings instead of those of the name."""
    return save_with_tokenizer(build(name, **({**MODELS, **EXPERTS}[name] if differs is None else differs)), folder)


def quantize(model: Path | str, out: Path, **settings: Any) -> None:
    """Quantize to nearest, without text, in groups of 32, embedding and head as they are, or as settings say."""
    usual = {"preset": "fast", "method": "rtn", "calib": "none", "group_size": 32, "head_bits": "keep"}
    quantc.quantize(model, out=out, **{**usual, **settings})


def rotate_heads(model: Path, out: Path) -> Report:
    """Quantize a model after rotating the outputs of attention by the weights before and behind them."""
    quantize(model, out / "plain", bits=4, symmetric=True)
    recipe = out / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [{rotate: {value: folded}}, quantize]\n")
    text = {"calib": str(model / "text.txt"), "samples": 2, "seq_len": 32}
    return quantc.quantize(model, out=out / "packed", plan=out / "plain/plan.yaml", recipe=str(recipe), **text)


def exported(target: str, out: Path) -> Expected:
    """Export out/packed; return quantc's logits (T, V) of TOKENS and the new folder."""
    quantc.export(out / "packed", to=target, out=out / "folder")
    return logits_of(quantc.load(out / "packed", dtype=torch.float32).eval(), TOKENS), out / "folder"


def disagreements(reader: str, expected: Mapping[str, Expected], most: float) -> str:
    """Return a line for each folder whose logits by a reader differ by more than that, or which it does not read."""
    answers = environments.ask(reader, [folder for _, folder in expected.values()], TOKENS)
    wrong = []
    for (name, (logits, _)), answer in zip(expected.items(), answers, strict=True):
        if isinstance(answer, str):
            wrong.append(f"{name}: {answer.strip()}")
        elif not (error := measure(logits, answer, None).error) <= most:
            wrong.append(f"{name}: a relative error of {error:.2g}")
    return "\n".join(wrong)
