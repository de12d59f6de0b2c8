"""Model folders with something amiss, and how the whole job refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantc
from quantc.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refusal(model: Any, out: Path) -> str:
    """The message with which the whole job refuses the model; nothing may be left behind."""
    with pytest.raises(ModelError) as caught:
        quantc.quantize(model, bits=4, method="rtn", out=out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.with_name(out.name + ".unfinished").exists()
    return str(caught.value)


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    found = load_file(folder / WEIGHTS)
    change(found)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **settings}))


def shard(folder: Path, count: int) -> list[str]:
    """The folder's weights cut into shards with an index; returns the shards' names."""
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    weight_map = {tensor: names[i % count] for i, tensor in enumerate(sorted(found))}
    for name in names:
        part = {tensor: found[tensor] for tensor in found if weight_map[tensor] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names
