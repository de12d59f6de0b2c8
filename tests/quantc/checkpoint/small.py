"""A small checkpoint of random codes, written without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quantc.checkpoint.config import PackedEntry, describe_quantization
from quantc.checkpoint.writer import CheckpointWriter
from quantc.spec import QuantSpec

SPEC = QuantSpec(3, 8)
SHAPE = (6, 20)
ENTRIES = {"block.0.up": PackedEntry(SPEC, SHAPE), "block.0.experts": PackedEntry(SPEC, SHAPE, (2,))}
SHARD = "model-00001-of-00001.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{name}.{part}": torch.randint(0, 100, what.shape, generator=generator).to(what.dtype)
        for name, entry in ENTRIES.items()
        for part, what in entry.layout().items()
    }
    return {**found, "norm.weight": torch.randn(20, generator=generator).bfloat16()}


def fill(writer: CheckpointWriter) -> None:
    for name, tensor in tensors().items():
        writer.add(name, tensor)
    writer.commit(
        {"model_type": "llama", "quantization_config": describe_quantization(ENTRIES, SPEC)}, {"format": "quantc"}
    )


def write(out: Path, **options: Any) -> Path:
    with CheckpointWriter(out, **options) as writer:
        fill(writer)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def only(tmp_path: Path, *names: str) -> bool:
    return sorted(item.name for item in tmp_path.iterdir()) == sorted(names)
