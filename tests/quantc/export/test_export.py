"""Checkpoints exported to GGUF: what is written, what is refused, and what llama.cpp makes of it."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantc
from quantc import api
from quantc.checkpoint.config import PackedEntry
from quantc.errors import CheckpointError, ModelError, UsageError
from quantc.evaluation import llama_cpp
from quantc.export import probe
from quantc.export.gguf.convert import BLOCK, Rounding, choose_type, to_blocks
from quantc.export.gguf.file import GgufWriter
from quantc.frontend.gguf_files import open_reader
from quantc.numerics.qtensor import QTensor
from quantc.spec import QuantSpec
from tests import families
from tests.quantc.cli_runner import run
from tests.quantc.export.tiny import build

gguf = pytest.importorskip("gguf")


def packed(folder: Path, name: str = "llama", own: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A tiny model of a name, quantized into folder/packed, without a tokenizer."""
    build(name, **(own or {})).save_pretrained(folder / "model")
    plain = {"bits": 4, "group_size": 32, "method": "rtn", "calib": "none"}
    quantc.quantize(folder / "model", out=folder / "packed", **(plain | settings))
    return folder / "packed"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in 4 bits, in groups of 32."""
    return packed(tmp_path_factory.mktemp("plain"))


def export(checkpoint: Path, **settings: Any) -> Any:
    return api.export(checkpoint, tokenizer=False, **settings)


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [(4, True, "Q4_0"), (4, False, "Q4_1"), (5, True, "Q5_0"), (5, False, "Q5_1"), (8, True, "Q8_0")],
)
def test_codes_become_blocks(bits: int, symmetric: bool, kind: str, tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, bits=bits, symmetric=symmetric)
    found = export(checkpoint, out=tmp_path / "tiny.gguf")
    assert found.types[kind][0] == 14
    read = {tensor.name: tensor for tensor in open_reader(tmp_path / "tiny.gguf").tensors}["blk.1.ffn_down.weight"]
    decoded = torch.from_numpy(gguf.dequantize(np.asarray(read.data), read.tensor_type))
    linear = quantc.load(checkpoint, dtype=torch.float32).model.layers[1].mlp.down_proj
    weight = linear(torch.eye(96)) - linear(torch.zeros(1, 96))
    assert torch.allclose(decoded.T, weight, atol=1e-3)
    assert (found.minimum_largest > 0) == (not symmetric)
    assert found.minimum_largest < 2**-11 * (1 << bits)
    if llama_cpp.missing() is None:
        assert found.agreement.error < 0.04


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2", "mixtral"])
def test_architectures_are_exported(name: str, tmp_path: Path) -> None:
    found = export(packed(tmp_path, name, head_bits=8, symmetric=True), out=tmp_path / "tiny.gguf")
    assert found.bytes == (tmp_path / "tiny.gguf").stat().st_size
    assert found.types["Q8_0"][0] >= 1
    reader = open_reader(tmp_path / "tiny.gguf")
    assert [bytes(reader.fields["general.architecture"].parts[-1]).decode()] == [found.architecture]
    if llama_cpp.missing() is None:
        assert found.agreement.error < (0.1 if name == "mixtral" else 0.05)  # 8 bits change some routes


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_floats_keep_their_type(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    build("qwen3").to(dtype).save_pretrained(tmp_path / "model")
    settings = {"bits": 4, "group_size": 32, "method": "rtn", "calib": "none", "head_bits": "keep"}
    quantc.quantize(tmp_path / "model", out=tmp_path / "packed", **settings)
    found = export(tmp_path / "packed", out=tmp_path / "tiny.gguf")
    assert {kind: count for kind, (count, _) in found.types.items()} == {name: 2, "F32": 9, "Q4_1": 14}


def test_groups_of_several_blocks_repeat_their_scale(tmp_path: Path) -> None:
    found = export(packed(tmp_path, group_size=64, symmetric=True), out=tmp_path / "tiny.gguf")
    assert set(found.types) == {"F32", "Q4_0", "Q8_0"}  # the embedding and the head are Q8_0


def test_a_window_that_llama_cpp_does_not_have_is_noted(tmp_path: Path) -> None:
    found = export(packed(tmp_path, "mistral", own={"sliding_window": 16}), out=tmp_path / "tiny.gguf")
    assert found.notes[0] == (
        "the model attends in a window of 16 tokens, and llama.cpp to all: longer texts give other results"
    )
    if llama_cpp.missing() is None:
        assert found.agreement.tokens == 16


def test_rounding_of_minima_is_counted_in_steps() -> None:
    draw = torch.Generator().manual_seed(0)
    spec = QuantSpec(bits=4, group_size=32)
    scales = torch.rand(8, 4, generator=draw).half()
    zeros = torch.randint(16, (8, 4), generator=draw).to(torch.uint8)
    tensor = QTensor(spec, torch.zeros(8, 128, dtype=torch.uint8), scales, zeros)
    rounding = Rounding()
    rounding.add(tensor, to_blocks(tensor))
    exact = zeros.double() * scales.double()
    steps = (exact.half().double() - exact).abs() / scales.double()
    assert rounding.largest == pytest.approx(float(steps.max()))
    assert rounding.rms == pytest.approx(float(steps.square().mean().sqrt()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 16}, "it has groups of 16, and blocks have 32 weights; quantize the model again with "
         "--group-size 32."),
        ({"bits": 3}, "it has asymmetric codes of 3 bits, for which no block is exact; quantize the model again with "
         "--bits 4."),
        ({"bits": 8}, "it has asymmetric codes of 8 bits, for which no block is exact; quantize the model again with "
         "--symmetric."),
        ({"sparsity": 0.25}, "some of its weights are dropped, and blocks would store them; quantize the model again "
         "without --sparsity."),
    ],
)  # fmt: skip
def test_what_gguf_cannot_hold_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, **settings)
    with pytest.raises(UsageError) as caught:
        export(checkpoint, out=tmp_path / "tiny.gguf")
    assert str(caught.value) == f"GGUF cannot hold model.layers.0.mlp.down_proj (and 13 more): {message}"
    assert not list(tmp_path.glob("*gguf*"))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"grouping": "per_ic"}, "it has per_ic groups"),
        ({"rank": 4}, "it has a low-rank addition of rank 4"),
        ({"hadamard": 32}, "its input is rotated while the model runs"),
        ({"wide_rows": 2}, "2 of its rows have one bit more"),
        ({"two_of_four": True}, "some of its weights are dropped, and blocks would store them"),
    ],
)
def test_parts_of_a_spec_that_no_block_has(spec: dict[str, Any], reason: str) -> None:
    found: Any = choose_type(PackedEntry(QuantSpec(bits=4, group_size=BLOCK, **spec), (64, 96)))
    assert found.reason == reason


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    checkpoint = packed(tmp_path, own={"intermediate_size": 104})
    with pytest.raises(UsageError) as caught:
        export(checkpoint)
    assert str(caught.value) == (
        "GGUF cannot hold model.layers.0.mlp.down_proj (and 1 more): blocks of 32 do not divide its rows of 104 "
        "weights; quantize the model again with --pin '*.down_proj=16'."
    )


def test_an_architecture_that_is_not_written(tmp_path: Path) -> None:
    families.build("opt").save_pretrained(tmp_path / "model")
    quantc.quantize(tmp_path / "model", out=tmp_path / "packed", bits=4, group_size=32, method="rtn", calib="none",
                    pins={"*fc2": 16})  # fmt: skip
    with pytest.raises(ModelError) as caught:
        export(tmp_path / "packed")
    assert str(caught.value).startswith(
        "the model is of type opt, which quantc does not write to GGUF; it writes gemma2"
    )


def test_a_missing_tokenizer(plain: Path) -> None:
    with pytest.raises(ModelError) as caught:
        api.export(plain)
    assert str(caught.value) == (
        f"{plain} has no tokenizer, but llama.cpp reads texts with the one in its file; copy tokenizer.json into "
        "the folder, or pass --no-tokenizer for a file that takes token ids alone."
    )


def test_a_file_that_exists(plain: Path, tmp_path: Path) -> None:
    checkpoint, file = plain, tmp_path / "tiny.gguf"
    export(checkpoint, out=file)
    before = file.read_bytes()
    with pytest.raises(UsageError) as caught:
        export(checkpoint, out=file)
    assert str(caught.value) == f"{file} exists; pass --force to replace it, or another --out."
    export(checkpoint, out=file, force=True)
    assert file.read_bytes() == before
    file.write_bytes(b"GGUF, but somebody else's")
    with pytest.raises(UsageError) as caught:
        export(checkpoint, out=file, force=True)
    assert str(caught.value) == f"{file} exists, and quantc did not write it; pass another --out."


def test_a_disk_that_is_full_in_the_last_tensor(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = GgufWriter.finish

    def full(self: GgufWriter) -> None:
        finish(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GgufWriter, "finish", full)
    with pytest.raises(CheckpointError) as caught:
        export(plain, out=tmp_path / "tiny.gguf")
    assert str(caught.value) == (
        f"{tmp_path / 'tiny.gguf'} could not be written (No space left on device); free some space or choose another "
        "--out."
    )
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 0, 1000))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError) as caught:
        export(plain, out=tmp_path / "tiny.gguf")
    assert str(caught.value).endswith("but the disk has 1.00 kB free; free some space or choose another --out.")


def test_weights_that_are_read_back_differently_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = packed(tmp_path, symmetric=True)
    decode = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda rows, kind: decode(rows, kind) * 1.001)
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint, out=tmp_path / "tiny.gguf")
    assert "was read back as other weights, so nothing was written" in str(caught.value)
    assert not list(tmp_path.glob("*gguf*"))


@pytest.mark.skipif(llama_cpp.missing() is not None, reason="needs llama.cpp")
def test_logits_that_differ_are_an_error(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = llama_cpp.LlamaCpp.logits
    monkeypatch.setattr(llama_cpp.LlamaCpp, "logits", lambda self, tokens: logits(self, tokens.flip(0)))
    with pytest.raises(CheckpointError) as caught:
        export(plain, out=tmp_path / "tiny.gguf")
    assert str(caught.value).startswith("llama.cpp computes other logits from the new GGUF file than quantc (mean KL")
    assert not list(tmp_path.glob("*gguf*"))


def test_without_llama_cpp_the_summary_says_so(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda _: None)
    found = export(plain, out=tmp_path / "tiny.gguf")
    assert found.agreement is None
    assert found.notes == [
        "nothing was verified by llama.cpp: xllamacpp is not installed; run `pip install xllamacpp==2026.10.11549`"
    ]


def test_where_memory_is_short_logits_are_not_compared(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "missing", lambda: None)
    monkeypatch.setattr(probe, "available_bytes", lambda: 1000)
    found = export(plain, out=tmp_path / "tiny.gguf")
    assert found.agreement is None
    assert found.notes[0].startswith("nothing was verified by llama.cpp: comparing logits needs ")


def test_agreement_is_measured_on_centred_logits() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    same = probe.measure(logits, logits + 3, None)
    assert same.error < 1e-6
    assert same.kl < 1e-9
    assert probe.measure(logits, 1.1 * logits, None).error == pytest.approx(0.1)


def test_the_command_prints_what_it_wrote(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "tiny-w4")
    found = json.loads(run("export", str(tmp_path / "tiny-w4"), "--no-tokenizer", "--json", "--quiet").stdout)
    assert found["output"] == str(tmp_path / "tiny-w4.gguf")
    assert found["bytes"] == (tmp_path / "tiny-w4.gguf").stat().st_size
    shown = run("export", str(tmp_path / "tiny-w4"), "--no-tokenizer", "--force").stdout
    assert "Q4_1 (14 tensors, " in shown
    assert "equal to the checkpoint's to the bit but for minima in float16: 0." in shown


def test_the_command_refuses_in_one_line(plain: Path, tmp_path: Path) -> None:
    result = run("export", str(plain), "-o", str(tmp_path / "missing" / "tiny.gguf"))
    assert result.stderr == (
        f"Error: the folder {tmp_path / 'missing'} of the output does not exist; make it, or pass another --out.\n"
    )
    assert result.exit_code == 2
