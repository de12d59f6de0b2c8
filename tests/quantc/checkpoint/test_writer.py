"""The checkpoint on disk is whole, or not there at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quantc
from quantc.checkpoint import writer
from quantc.checkpoint.ownership import mark
from quantc.checkpoint.reader import CheckpointReader, is_checkpoint, verify
from quantc.checkpoint.shards import INDEX, checksum
from quantc.checkpoint.writer import CheckpointWriter
from quantc.errors import CheckpointError, UsageError
from quantc.machine.dtypes import DTYPE_NAMES
from tests.quantc.checkpoint.small import ENTRIES, SHARD, contents, only, tensors, write


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_what_is_written_is_read_back(tmp_path: Path, shard_bytes: int) -> None:
    reader = CheckpointReader(write(tmp_path / "out", shard_bytes=shard_bytes))
    expected = tensors()
    for name, tensor in expected.items():
        assert reader.tensor(name).dtype == tensor.dtype
        assert torch.equal(reader.tensor(name), tensor)
    assert reader.entries == ENTRIES
    assert reader.manifest["format"] == "quantc"
    found = verify(tmp_path / "out")
    assert (found.tensors, found.bytes) == (len(expected), sum(t.nbytes for t in expected.values()))
    assert only(tmp_path, "out")


def test_shards_are_cut_by_size_and_named_by_their_number(tmp_path: Path) -> None:
    out = write(tmp_path / "out", shard_bytes=1)
    count = len(tensors())
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((out / INDEX).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum((out / name).stat().st_size for name in shards)
    assert sorted(index["weight_map"].values()) == shards
    assert CheckpointReader(out).weights_bytes() == index["metadata"]["total_size"]


def test_shards_are_of_the_size_asked_for(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=1000) as writer:
        for index in range(10):
            writer.add(f"t{index}", torch.zeros(100))
        assert writer.finish_weights() == sum(f.stat().st_size for f in writer.folder.glob("*.safetensors"))
        writer.commit({}, {})
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4  # 3 + 3 + 3 + 1


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_checksum_and_manifest_know_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", tensor.T)  # written row-major whatever its strides
        entry = writer.tensors["t"]
        writer.commit({}, {})
    read = load_file(tmp_path / "out" / SHARD)["t"]
    assert read.dtype == dtype
    assert torch.equal(read, tensor.T)
    assert entry == {"dtype": DTYPE_NAMES[dtype], "shape": [3, 2], "sha256": checksum(tensor.T.contiguous())}


def test_an_existing_output_is_not_overwritten_unasked(whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(UsageError) as caught:
        CheckpointWriter(whole)
    assert str(caught.value) == (
        f"{whole} exists already, and nothing is overwritten unasked; pass --force or another --out."
    )
    assert contents(whole) == before


def test_force_replaces_the_old_output_only_on_commit(whole: Path, tmp_path: Path) -> None:
    (whole / "report.html").write_text("old")
    before = contents(whole)
    with CheckpointWriter(whole, force=True) as writer:
        writer.add("t", torch.zeros(2))
        assert contents(whole) == before
        writer.commit({}, {})
        assert not (whole / "report.html").exists()
    assert list(load_file(whole / SHARD)) == ["t"]
    assert only(tmp_path, "whole")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_touches_nothing(
    tmp_path: Path, force: bool, kind: type[BaseException]
) -> None:
    before = contents(write(tmp_path / "out")) if force else {}
    with pytest.raises(kind), CheckpointWriter(tmp_path / "out", force, shard_bytes=10) as writer:
        writer.add("t", torch.zeros(100))
        writer.add_text("notes.txt", "half")
        assert is_checkpoint(tmp_path / "out") == force
        raise kind
    assert only(tmp_path, *(["out"] if force else []))
    assert not force or contents(tmp_path / "out") == before


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("t", torch.zeros(3))
    assert only(tmp_path)


def test_an_unfinished_folder_of_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    mark(tmp_path / "out.unfinished")
    (tmp_path / "out.unfinished/shard-00009.data").write_bytes(b"stale")
    out = write(tmp_path / "out")
    assert not (out / "shard-00009.data").exists()
    assert only(tmp_path, "out")


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["pathlib.Path.write_text", "quantc.checkpoint.shards._copy", "os.fsync"])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, force: bool
) -> None:
    before = contents(write(tmp_path / "out")) if force else {}
    with monkeypatch.context() as patch:
        patch.setattr(target, no_space)
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path / "out", force=force)
    message = str(caught.value)
    remedy = "free some space or choose another --out, and run again."
    assert message.endswith(f" could not be written (No space left on device); {remedy}")
    assert message.count("could not be written") == 1
    assert not hasattr(caught.value, "__notes__")
    assert "\n" not in message
    assert only(tmp_path, *(["out"] if force else []))
    assert not force or contents(tmp_path / "out") == before


def test_a_disk_that_fills_before_a_block_is_finished_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointWriter, "save", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        quantc.quantize(source, bits=4, method="rtn", out=tmp_path / "out")
    assert only(tmp_path)


def test_what_cannot_be_written_beside_the_weights_is_found_before_the_first_block(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", no_space)
    monkeypatch.setattr("quantc.pipeline.sweep.Sweep.build_outside", lambda *_: pytest.fail("blocks were built"))
    with pytest.raises(CheckpointError, match=r"out.unfinished could not be written \(No space left on device\); free"):
        quantc.quantize(source, bits=4, method="rtn", out=tmp_path / "out")
    assert only(tmp_path)


@pytest.mark.parametrize("target", ["quantc.checkpoint.shards._copy", "quantc.report.Report.write"])
def test_a_disk_that_fills_at_the_end_of_a_run_is_one_sentence_and_keeps_the_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(target, no_space)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            quantc.quantize(source, bits=4, method="rtn", out=tmp_path / "out")
    place = tmp_path / "out.unfinished"
    assert caught.value.__notes__ == [f"Kept in {place}: 2 of 2 blocks; --resume continues from there."]
    quantc.quantize(source, bits=4, method="rtn", out=tmp_path / "out", resume=True)
    verify(tmp_path / "out")
    assert only(tmp_path, "out")


def test_too_little_space_is_seen_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"has 0 MiB free, but the checkpoint needs about \d+ MiB; free some"):
        quantc.quantize(source, bits=4, method="rtn", out=tmp_path / "out")
    assert only(tmp_path)


def test_an_output_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be created \(Not a directory\); choose an --out in a folder"):
        CheckpointWriter(tmp_path / "file/out").__enter__()


def test_the_current_folder_as_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        CheckpointWriter(Path("."))


def test_force_replaces_nothing_but_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("irreplaceable")
    with pytest.raises(UsageError, match="is no quantc checkpoint, so --force does not replace it"):
        CheckpointWriter(tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text(encoding="utf-8") == "irreplaceable"
