"""Every damage of a checkpoint is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantc
from quantc.checkpoint.reader import MANIFEST, CheckpointReader, is_checkpoint, verify
from quantc.checkpoint.shards import INDEX
from quantc.errors import CheckpointError
from quantc.machine.dtypes import DTYPE_NAMES
from tests.quantc.checkpoint.small import ENTRIES, SHARD, tensors, write


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The shard with its tensors changed, and nothing else."""
    found = load_file(folder / SHARD)
    change(found)
    save_file(found, folder / SHARD)


def drop(found: dict[str, torch.Tensor], name: str) -> None:
    del found[name]


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def refusal(folder: Path) -> str:
    """The message with which a reader refuses the checkpoint: one line."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_shard_is_named_with_a_tensor_in_it(whole: Path, keep: int) -> None:
    data = (whole / SHARD).read_bytes()
    (whole / SHARD).write_bytes(data[:keep])
    message = refusal(whole)
    first = min(tensors())
    assert message.startswith(f"{whole / SHARD} is truncated or damaged (")
    assert message.endswith(f"it holds {first} and {len(tensors()) - 1} more tensors, so copy that file again.")


@pytest.mark.parametrize("name", [f"{entry}.{part}" for entry in ENTRIES for part in ENTRIES[entry].layout()])
def test_a_wrong_dtype_is_named(whole: Path, name: str) -> None:
    rewrite(whole, lambda found: found.update({name: found[name].to(torch.int32)}))
    message = refusal(whole)
    expected = tensors()[name]
    shape = tuple(expected.shape)
    assert f"{name} is I32 {shape}, but {MANIFEST} needs {DTYPE_NAMES[expected.dtype]} {shape}" in message


@pytest.mark.parametrize("name", tensors())
def test_a_wrong_shape_is_named(whole: Path, name: str) -> None:
    rewrite(whole, lambda found: found.update({name: found[name][:-1].clone()}))
    expected = tensors()[name]
    assert f"{name} is {DTYPE_NAMES[expected.dtype]} {tuple(expected[:-1].shape)}, but" in refusal(whole)


@pytest.mark.parametrize("name", tensors())
def test_a_missing_tensor_is_named(whole: Path, name: str) -> None:
    rewrite(whole, lambda found: drop(found, name))
    assert refusal(whole) == (
        f"{whole}: the tensor {name} that {MANIFEST} lists is missing; copy the checkpoint again."
    )


def test_a_part_that_the_manifest_lacks_too_is_missed(whole: Path) -> None:
    name = "block.0.up.zeros"
    rewrite(whole, lambda found: drop(found, name))
    edit_json(whole / MANIFEST, lambda content: content["tensors"].pop(name))
    edit_json(whole / INDEX, lambda content: content["weight_map"].pop(name))
    assert f"the part {name} is missing, but the spec of that weight needs it" in refusal(whole)


def test_a_spec_that_does_not_fit_the_parts_is_named(whole: Path) -> None:
    def more_bits(content: dict[str, Any]) -> None:
        content["quantization_config"]["default"]["bits"] = 5
        del content["quantization_config"]["sha256"]

    edit_json(whole / "config.json", more_bits)
    assert "block.0.experts.qweight is U8 (2, 6, 8), but its spec needs U8 (2, 6, 13)" in refusal(whole)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10**9, "block.0.up.qweight is U8 (6, 8), but its spec needs"),
        (
            10**12,
            "block.0.up has the shape [1000000000000, 1000000000000], not 2 or 3 whole numbers from 1 to 21474836",
        ),
    ],
)
def test_a_length_is_not_believed(whole: Path, size: int, message: str) -> None:
    def huge(content: dict[str, Any]) -> None:
        content["quantization_config"]["modules"]["block.0.up"]["shape"] = [size, size]
        del content["quantization_config"]["sha256"]

    edit_json(whole / "config.json", huge)
    assert message in refusal(whole)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    out = write(tmp_path / "out", shard_bytes=1)
    lost = out / "model-00002-of-00007.safetensors"
    lost.unlink()
    assert refusal(out) == f"{lost} is missing, but {INDEX} lists it; copy the checkpoint again."


@pytest.mark.parametrize("name", [MANIFEST, "config.json", INDEX])
@pytest.mark.parametrize("text", ["{", "", "[1]", '"text"'])
def test_broken_json_is_named(whole: Path, name: str, text: str) -> None:
    (whole / name).write_text(text)
    message = refusal(whole)
    assert message.startswith(str(whole / name))
    assert "copy it again" in message


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_missing_json_is_named(whole: Path, name: str) -> None:
    (whole / name).unlink()
    assert refusal(whole).startswith(f"{whole / name} cannot be read (")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (MANIFEST, lambda content: content["tensors"]["norm.weight"].pop("dtype")),
        (MANIFEST, lambda content: content.update(tensors=["norm.weight"])),
        (MANIFEST, lambda content: content.pop("tensors")),
        (INDEX, lambda content: content.update(weight_map=["norm.weight"])),
        ("config.json", lambda content: content.update(quantization_config=["quantc"])),
    ],
    ids=["entry", "table", "no-table", "index", "config"],
)
def test_json_of_an_unknown_make_is_named(whole: Path, name: str, change: Callable[[Any], None]) -> None:
    edit_json(whole / name, change)
    with pytest.raises(CheckpointError, match=name):
        verify(whole)


def test_a_copy_without_a_manifest_can_be_read_but_not_verified(whole: Path) -> None:
    (whole / MANIFEST).unlink()
    assert is_checkpoint(whole)
    assert CheckpointReader(whole).entries
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST}, so there are no checksums to verify"):
        verify(whole)


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path)
    assert refusal(tmp_path) == (f"{tmp_path} is no quantc checkpoint; pass a folder that `quantc quantize` wrote.")


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("name", tensors())
def test_verify_names_the_tensor_of_a_flipped_bit(whole: Path, name: str, bit: int) -> None:
    def flip(found: dict[str, torch.Tensor]) -> None:
        found[name].view(torch.uint8).reshape(-1)[-1] ^= 1 << bit

    rewrite(whole, flip)
    CheckpointReader(whole)  # headers say nothing about it
    with pytest.raises(CheckpointError) as caught:
        verify(whole)
    assert str(caught.value) == (
        f"{whole}: the tensor {name} in {SHARD} has changed since it was written (its checksum differs); "
        "copy that file again."
    )


def test_load_with_verify_names_the_tensor_of_a_flipped_bit(source: Path, tmp_path: Path) -> None:
    quantc.quantize(source, bits=4, method="rtn", out=tmp_path / "out")
    file = tmp_path / "out" / SHARD
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    quantc.load(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"the tensor \S+ in model-00001-of-00001.safetensors has changed"):
        quantc.load(tmp_path / "out", verify=True)
