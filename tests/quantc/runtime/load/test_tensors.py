"""The files hold every tensor of the model, and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantc
from quantc.checkpoint.reader import MANIFEST, verify
from quantc.checkpoint.shards import INDEX
from quantc.errors import CheckpointError
from tests.quantc.runtime.load.folders import (
    DOORS,
    EMBEDDING,
    NORM,
    PART,
    SHARD,
    assert_refused,
    drop,
    edit,
    forget_checksums,
    from_pretrained,
    logits,
    refusals,
    rewrite,
)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (NORM, NORM),
        ("model.norm.weight", "model.norm.weight"),
        (EMBEDDING, EMBEDDING),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_never_drawn_at_random(packed: Path, lost: str, named: str) -> None:
    rewrite(packed, drop(lost))
    message = (
        f"{packed}: LlamaForCausalLM needs the tensor {named}, but the files have none; copy the checkpoint again."
    )
    assert refusals(packed) == [message] * 3


def test_a_missing_module_is_never_drawn_at_random(packed: Path) -> None:
    forget_checksums(packed)

    def forget(content: dict[str, Any]) -> None:
        settings = content["quantization_config"]
        settings["modules"] = {name: own for name, own in settings["modules"].items() if ".1.mlp" not in name}
        del settings["sha256"]

    rewrite(packed, drop("model.layers.1.mlp"))
    edit(packed / "config.json", forget)
    assert_refused(packed, "needs the tensor model.layers.1.mlp.down_proj.weight, but the files have none")


def test_a_missing_part_is_no_uninitialised_memory(packed: Path) -> None:
    rewrite(packed, drop(PART))
    assert_refused(packed, f"the part {PART} is missing, but the spec of that weight needs it")


def test_a_missing_embedding_of_a_tied_head_is_never_drawn_at_random(built: Path, tmp_path: Path) -> None:
    tied = shutil.copytree(built / "qwen2", tmp_path / "tied")
    rewrite(tied, drop(EMBEDDING))
    assert_refused(tied, f"needs the tensor {'lm_head.weight'}, but the files have none")


def test_a_tensor_that_the_model_does_not_take_is_refused(packed: Path) -> None:
    rewrite(packed, lambda tensors: tensors.update({"model.layers.2.extra": torch.zeros(3)}))
    message = "the files have the tensor model.layers.2.extra, but LlamaForCausalLM takes no such tensor; config.json"
    assert_refused(packed, message)


def test_a_head_beside_the_embedding_it_is_tied_to_is_refused(built: Path, tmp_path: Path) -> None:
    tied = shutil.copytree(built / "qwen2", tmp_path / "tied")
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": torch.randn_like(tensors[EMBEDDING])}))
    assert_refused(
        tied, f"the files have lm_head.weight and {EMBEDDING}, but config.json says that they are one tensor"
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(7),
            f"{NORM} has the shape (7,), but config.json describes (64,); the two do not belong together.",
        ),
        (torch.zeros(64, dtype=torch.uint8), f"{NORM} is U8, but the model has torch.float32 there; copy it again."),
    ],
)
def test_a_tensor_of_another_shape_or_kind_is_refused(packed: Path, tensor: torch.Tensor, message: str) -> None:
    rewrite(packed, lambda tensors: tensors.update({NORM: tensor}))
    assert_refused(packed, message)
    with pytest.raises(CheckpointError, match="do not belong together|copy it again"):
        from_pretrained(packed, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_copy_that_save_pretrained_made_loads_through_both_doors(built: Path, name: str) -> None:
    expected = logits(quantc.load(built / name))
    for door in (quantc.load, from_pretrained):
        assert torch.equal(logits(door(built / f"{name}-copy")), expected)


def test_a_shard_that_holds_more_than_the_index_says_is_refused(packed: Path) -> None:
    tensors = load_file(packed / SHARD)
    save_file(tensors | {"more": torch.zeros(2)}, packed / SHARD)
    message = f"{packed / SHARD} holds the tensor more, but {INDEX} does not list it; copy the checkpoint again."
    assert refusals(packed, [*DOORS, verify]) == [message] * 4


def test_a_tensor_in_two_shards_is_refused(packed: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    tensors = load_file(packed / SHARD)
    save_file({NORM: tensors[NORM] * 2, "model.norm.weight": tensors.pop("model.norm.weight")}, packed / second)
    save_file(tensors, packed / SHARD)
    edit(packed / INDEX, lambda content: content["weight_map"].update({"model.norm.weight": second}))
    assert_refused(
        packed, f"{second} holds the tensor {NORM}, but {INDEX} says that it is in {SHARD}", [*DOORS, verify]
    )


def test_a_tensor_without_a_checksum_is_refused(packed: Path) -> None:
    edit(packed / MANIFEST, lambda content: content["tensors"].pop(NORM))
    assert_refused(packed, f"the tensor {NORM} is not listed in {MANIFEST}, so it has no checksum", [*DOORS, verify])
