"""A shard written tensor by tensor is the file that safetensors' own writer makes."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantc.checkpoint.shards import COPY_BYTES, ShardWriter
from quantc.machine.dtypes import DTYPE_NAMES

shapes = st.lists(st.integers(0, 5), max_size=3)
# The two 64-bit types are not mixed: safetensors' order of them is its own affair, and aligned either way.
tensors = st.lists(st.tuples(st.sampled_from([d for d in DTYPE_NAMES if d != torch.int64]), shapes), max_size=8)


@settings(deadline=None)
@given(tensors)
def test_same_bytes_as_safetensors(tmp_path_factory, wanted) -> None:
    folder = tmp_path_factory.mktemp("shard")
    made = {f"größe.{i}": torch.randint(0, 2, tuple(shape)).to(dtype) for i, (dtype, shape) in enumerate(wanted)}
    if not made:
        return
    written = write(folder / "ours.safetensors", made)
    save_file(made, folder / "theirs.safetensors", metadata={"format": "pt"})
    assert (folder / "ours.safetensors").read_bytes() == (folder / "theirs.safetensors").read_bytes()
    assert written == sum(tensor.nbytes for tensor in made.values())
    assert not list(folder.glob("*.data"))


def test_tensors_larger_than_a_copy_step(tmp_path: Path) -> None:
    made = {"b": torch.randint(0, 255, (COPY_BYTES * 2 + 3,), dtype=torch.uint8), "a": torch.rand(COPY_BYTES // 3)}
    write(tmp_path / "ours.safetensors", made)
    save_file(made, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("finished", [False, True])
def test_tensors_are_read_and_replaced(finished: bool, tmp_path: Path) -> None:
    made = {"b": torch.rand(3, 2), "none": torch.empty(0, 4), "a": torch.arange(5, dtype=torch.uint8)}
    shard = ShardWriter(tmp_path / "spool.data")
    for name, tensor in made.items():
        shard.add(name, tensor)
    shard.replace("b", -made["b"])
    shard.replace("none", made["none"])
    assert shard.bytes == 3 * 2 * 4 + 5
    if finished:
        shard.finish(tmp_path / "ours.safetensors")
    assert torch.equal(shard.read("b"), -made["b"])
    assert shard.read("none").shape == (0, 4)
    if not finished:
        shard.finish(tmp_path / "ours.safetensors")
    save_file({**made, "b": -made["b"]}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_shard_goes_back_to_a_state(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "spool.data")
    shard.add("a", torch.arange(4))
    state = shard.state()
    shard.replace("a", -torch.arange(4))
    shard.add("b", torch.arange(3))
    long = (tmp_path / "spool.data").read_bytes()
    back = ShardWriter.restored(tmp_path / "spool.data", json.loads(json.dumps(state)), tmp_path / "none")
    assert (tmp_path / "spool.data").read_bytes() == long
    back.cut_off()
    assert torch.equal(back.read("a"), torch.arange(4))
    assert list(back.described()) == ["a"]
    assert (tmp_path / "spool.data").stat().st_size == 32
    back.add("b", torch.arange(2))
    back.finish(tmp_path / "ours.safetensors")
    save_file({"a": torch.arange(4), "b": torch.arange(2)}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_a_spool_that_is_too_short_is_no_state(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "spool.data")
    shard.add("a", torch.arange(4))
    (tmp_path / "spool.data").write_bytes(bytes(31))
    with pytest.raises(ValueError, match=r"spool.data has 31 of 32 bytes$"):
        ShardWriter.restored(tmp_path / "spool.data", shard.state(), tmp_path / "none")


def write(file: Path, made: dict[str, torch.Tensor]) -> int:
    shard = ShardWriter(file.with_name("spool.data"))
    for name, tensor in made.items():
        shard.add(name, tensor)
    shard.finish(file)
    assert shard.place == file
    assert list(shard.described()) == list(made)
    return shard.bytes
