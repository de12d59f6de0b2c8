"""Ways to load a checkpoint's folder, and to change what is in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantc
from quantc.checkpoint.reader import MANIFEST
from quantc.checkpoint.shards import INDEX, checksum
from quantc.errors import CheckpointError

SHARD = "model-00001-of-00001.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
PART = "model.layers.1.mlp.down_proj.scales"
EMBEDDING = "model.embed_tokens.weight"
TOKENS = torch.tensor([[3, 17, 42, 99, 3, 7, 120, 64]])
Change = Callable[[dict[str, Any]], Any]


def from_pretrained(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)


def load_verified(folder: Path) -> PreTrainedModel:
    return quantc.load(folder, verify=True)


DOORS = [quantc.load, load_verified, from_pretrained]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def edit(file: Path, change: Change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def forget_checksums(folder: Path) -> None:
    """As if an earlier quantc had written the folder."""
    edit(folder / MANIFEST, lambda content: content.pop("files"))


def rewrite(folder: Path, change: Change) -> None:
    """The tensors changed, and index and manifest with them, so that only the model itself can tell."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    names = {"I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
    spelled = {dtype: name for name, dtype in names.items()}
    entries = {
        name: {"dtype": spelled[tensor.dtype], "shape": list(tensor.shape), "sha256": checksum(tensor)}
        for name, tensor in tensors.items()
    }
    edit(folder / INDEX, lambda content: content.update(weight_map=dict.fromkeys(tensors, SHARD)))
    edit(folder / MANIFEST, lambda content: content.update(tensors=entries))


def refusals(folder: Path, doors: list[Callable[[Path], Any]] | None = None) -> list[str]:
    """What each door says, one line each; every one of them refuses."""
    found = []
    for door in doors or DOORS:
        with pytest.raises(CheckpointError) as caught:
            door(folder)
        assert "\n" not in str(caught.value)
        found.append(str(caught.value))
    return found


def assert_refused(folder: Path, message: str, doors: list[Callable[[Path], Any]] | None = None) -> None:
    for found in refusals(folder, doors):
        assert message in found, found


def drop(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(names)]
