"""GGUF files in several parts, and lists in their headers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import quantc
from quantc.errors import ModelError, UsageError
from quantc.frontend import open_model
from quantc.frontend.gguf_files import open_reader
from tests.quantc.frontend.tiny_gguf import TOKENS, gguf, tensors, write

RTN = {"bits": 8, "group_size": 8, "method": "rtn"}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None], use_cache=False).logits


def refusal(file: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(file)
    return str(caught.value)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(("per_part", "count"), [(8, 3), (12, 2)])
def test_parts_are_read_as_one_file(head: bool, per_part: int, count: int, tmp_path: Path) -> None:
    (whole,) = write(tmp_path / "tiny.gguf", tensors(head))
    parts = write(tmp_path / "split.gguf", tensors(head), per_part=per_part)
    assert len(parts) == count
    expected = logits(open_model(whole).load_whole(torch.float32))
    for part in parts:
        source = open_model(part)
        assert source.name == "split"
        assert source.weight_files() == parts
        assert source.notes == []
        assert torch.equal(logits(source.load_whole(torch.float32)), expected)
    quantc.quantize(parts[1], **RTN, out=tmp_path / "out")
    quantc.quantize(whole, **RTN, out=tmp_path / "expected")
    found, made = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("out", "expected"))
    assert found.keys() == made.keys()
    assert all(torch.equal(tensor, made[name]) for name, tensor in found.items())


def test_any_part_that_changes_is_another_model(tmp_path: Path) -> None:
    parts = write(tmp_path / "split.gguf", per_part=8)
    before = open_model(parts[0]).contents()
    assert list(before) == [part.name for part in parts]
    for part in parts:
        content = part.read_bytes()
        part.write_bytes(content[:-64] + bytes([255 - byte for byte in content[-64:]]))
    after = open_model(parts[0]).contents()
    assert all(before[part.name] != after[part.name] for part in parts)


def test_an_interrupted_run_is_not_resumed_with_another_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write(tmp_path / "split.gguf", per_part=8)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("quantc.driver.job.finish_weights", stop)
        quantc.quantize(parts[0], **RTN, out=tmp_path / "out")
    content = parts[2].read_bytes()
    parts[2].write_bytes(content[:-64] + bytes(64))
    with pytest.raises(UsageError, match=parts[2].name):
        quantc.quantize(parts[0], **RTN, out=tmp_path / "out", resume=True)


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    first, second, third = write(tmp_path / "split.gguf", per_part=8)
    second.unlink()
    assert refusal(third) == (
        f"{third} is one of 3 parts, but not all are beside it: split-00002-of-00003.gguf missing; fetch the rest."
    )
    first.rename(tmp_path / "renamed.gguf")
    assert refusal(tmp_path / "renamed.gguf") == (
        f"{tmp_path / 'renamed.gguf'} is one of 3 parts, but 1 were found by their names; give all parts their names "
        "back, such as name-00001-of-00002.gguf."
    )


def test_parts_of_different_files(tmp_path: Path) -> None:
    first, second, _ = write(tmp_path / "split.gguf", per_part=8)
    (tmp_path / "other").mkdir()
    others = write(tmp_path / "other" / "split.gguf", {**tensors(), "more.weight": np.ones(4, np.float32)}, per_part=9)
    assert len(others) == 3
    shutil.copy(others[1], second)
    assert refusal(first) == (
        f"{first} and its other parts are not of one file: {first.name} says 21 tensors, and {second.name} 22; fetch "
        "all of them again."
    )


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    first, second, third = write(tmp_path / "split.gguf", per_part=8)
    (tmp_path / "other").mkdir()
    reversed_order = dict(reversed(tensors().items()))
    shutil.copy(write(tmp_path / "other" / "split.gguf", reversed_order, per_part=8)[2], third)
    assert refusal(second) == (
        f"{first} and its other parts are not of one file: blk.0.attn_v.weight is in {first.name} and in {third.name}; "
        "fetch all of them again."
    )


def test_parts_whose_names_are_exchanged(tmp_path: Path) -> None:
    first, second, third = write(tmp_path / "split.gguf", per_part=8)
    second.rename(tmp_path / "aside")
    third.rename(second)
    (tmp_path / "aside").rename(third)
    assert refusal(first) == (
        f"{second} says that it is part 3, and its name that it is part 2; give all parts their names back, such as "
        "name-00001-of-00002.gguf."
    )


def test_lists_are_read_as_the_package_reads_them(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "tiny.gguf")
    plain, found = gguf.GGUFReader(file), open_reader(file)
    assert list(found.fields) == list(plain.fields)
    assert found.fields["tokenizer.ggml.tokens"].contents() == TOKENS
    for name, expected in plain.fields.items():
        field = found.fields[name]
        assert (field.offset, field.name, list(field.types)) == (expected.offset, expected.name, list(expected.types))
        assert list(field.data) == list(expected.data)
        assert len(field.parts) == len(expected.parts)
        for part, other in zip(field.parts, expected.parts, strict=True):
            assert part.dtype == other.dtype
            assert np.array_equal(part, other)
        assert field.contents() == expected.contents()
    assert [tensor.data_offset for tensor in found.tensors] == [tensor.data_offset for tensor in plain.tensors]


@pytest.mark.parametrize("key", ["tokenizer.ggml.tokens", "tokenizer.ggml.scores"])
def test_a_list_that_is_longer_than_the_file(key: str, tmp_path: Path) -> None:
    (file,) = write(tmp_path / "tiny.gguf")
    content = bytearray(file.read_bytes())
    place = content.index(key.encode()) + len(key) + 8
    content[place : place + 8] = (1 << 40).to_bytes(8, "little")
    file.write_bytes(content)
    assert refusal(file) == (f"{file} is not a readable GGUF file (a list reaches beyond the end); fetch it again.")


def test_the_byte_order_of_other_processors(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "tiny.gguf", endianess=gguf.GGUFEndian.BIG)
    assert refusal(file) == (
        f"{file} has the byte order of other processors; convert it with `gguf-convert-endian {file} native`."
    )
