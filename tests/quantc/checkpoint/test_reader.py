"""The checkpoint on disk: whole or not at all, and every damage named."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantc
from quantc.checkpoint import writer
from quantc.checkpoint.config import (
    PackedEntry,
    ResidualRotation,
    describe_quantization,
    read_quantization,
    read_residual_rotation,
)
from quantc.checkpoint.ownership import mark
from quantc.checkpoint.reader import MANIFEST, CheckpointReader, is_checkpoint, verify
from quantc.checkpoint.shards import INDEX, checksum
from quantc.checkpoint.writer import CheckpointWriter
from quantc.errors import CheckpointError, UsageError
from quantc.formats import DENSE
from quantc.machine.dtypes import DTYPE_NAMES
from quantc.spec import QuantSpec
from tests.families import build
from tests.helpers import save_with_tokenizer

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


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole")


# Writing


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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("source") / "model")


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


# Reading


def test_a_config_without_a_default_is_refused() -> None:
    described = describe_quantization(ENTRIES, SPEC)
    del described["default"]
    with pytest.raises(CheckpointError, match=r"quantization_config cannot be read \('default'\); copy it again"):
        read_quantization({"quantization_config": described})


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


def test_version_3_may_rotate_hidden_states_too() -> None:
    rotation = ResidualRotation(32, 16, "block.0", "block.1")
    entries = {"a": PackedEntry(SPEC, (6, 8)), "b": PackedEntry(replace(SPEC, wide_rows=2), (6, 8))}
    for found, version in (({"a": entries["a"]}, 2), (entries, 3)):
        settings = describe_quantization(found, replace(SPEC, wide_rows=3), rotation)
        assert settings["version"] == version
        assert read_quantization({"quantization_config": settings}) == found
        assert read_residual_rotation({"quantization_config": settings}) == rotation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": 5}, "format version 5, but this quantc reads versions 1 to 4; install the quantc that wrote it."),
        ({"version": None}, "format version None, but this quantc reads versions 1 to 4"),
        ({"version": 2}, "residual_rotation cannot be read"),
        ({"residual_rotation": {}}, "residual_rotation belongs to version 2, but the checkpoint has version 1"),
        ({"version": 2, "residual_rotation": {"width": 30, "order": 16, "first": "a", "last": "b"}}, "blocks of 16"),
        ({"version": 2, "residual_rotation": {"width": 32, "order": 16, "angle": 1}}, "residual_rotation cannot"),
        ({"quant_method": "gptq"}, "quantized by 'gptq', but only 'quantc' can be read here"),
        ({"default": {"bits": 4, "codebook": "nf4"}}, "has the unknown key 'codebook'"),
        ({"version": 3, "residual_rotation": {}}, "residual_rotation cannot be read"),
        ({"default": {"bits": 4, "wide_rows": 2}}, "has 2 of 6 rows in one bit more, in version 1"),
        ({"version": 3, "default": {"bits": 4, "wide_rows": 6}}, "has 6 of 6 rows in one bit more, in version 3"),
        ({"default": {"bits": 12}}, "bits is 12, but codes have 2 to 8 bits"),
        ({"modules": {"a": {}}}, "quantization_config cannot be read ('shape')"),
        ({"modules": {"a": {"shape": [3]}}}, "quantization_config cannot be read ("),
        ({"modules": {"a": {"shape": ["x", "y"]}}}, "quantization_config cannot be read ("),
        ({"modules": {"a": {"shape": [2.0, 4]}}}, "a has the shape [2.0, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [True, 4]}}}, "a has the shape [True, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [0, 4]}}}, "a has the shape [0, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [2, 2, 3, 4]}}}, "a has the shape [2, 2, 3, 4], not 2 or 3 whole numbers"),
        ({"modules": {"a": {"shape": [2, 4], "transposed": "no"}}}, "a is transposed: 'no', not true or false"),
        ({"modules": {"a": {"shape": [2, 4], "rank": 3}}}, "a has rank 3, but a weight of 2 x 4 has at most 2"),
        ({"modules": {"a": {"shape": [2, 4], "rank": 10**12}}}, "rank is 1000000000000, but 2147483647 at most"),
        ({"modules": {"a": {"shape": [2, 4], "group_size": 2**31}}}, "group_size is 2147483648, but 2147483647"),
        ({"default": None}, "quantization_config cannot be read ("),
        ({"sha256": "0"}, "quantization_config has changed since it was written (its sha256 differs)"),
        ({"default": {"bits": 3, "group_size": 7}}, "quantization_config has changed since it was written"),
        ({"modules": ["a"]}, "quantization_config cannot be read ("),
        ({"modules": None}, "quantization_config cannot be read ("),
    ],
)
def test_a_quantization_config_of_another_make_is_refused(settings: dict[str, Any], message: str) -> None:
    config = {"quantization_config": {**describe_quantization(ENTRIES, SPEC), **settings}}
    with pytest.raises(CheckpointError) as caught:
        read_quantization(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_an_unquantized_config_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="quantized by None, but only 'quantc' can be read here"):
        read_quantization(config)


def test_quantization_config_roundtrip_keeps_what_differs() -> None:
    entries = {
        "a": PackedEntry(QuantSpec(4, 32), (8, 64)),
        "b": PackedEntry(QuantSpec(3, -1, "per_ic", True, 2), (5, 7)),
        "c": PackedEntry(QuantSpec(4, 32), (8, 64), (4,)),
    }
    described = json.loads(json.dumps(describe_quantization(entries, QuantSpec(4, 32))))
    assert read_quantization({"quantization_config": described}) == entries
    assert described["modules"]["a"] == {"shape": [8, 64]}
    assert described["modules"]["c"] == {"shape": [4, 8, 64]}


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


def test_every_part_of_the_layout_is_checked() -> None:
    assert set(DENSE.layout(QuantSpec(rank=2), (4, 4))) == {"qweight", "scales", "zeros", "low_rank_a", "low_rank_b"}
