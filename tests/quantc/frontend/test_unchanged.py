"""A source whose files change while they are read ends the run in one sentence; other weights are another model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantc
from quantc.checkpoint import writer
from quantc.checkpoint.reader import verify
from quantc.errors import ModelError, UsageError
from quantc.frontend import open_model
from quantc.frontend.gguf_tensors import StoredTensors
from quantc.frontend.unchanged import (
    MOST_PIECES,
    PIECE_BYTES,
    PIECES,
    Unchanged,
    fingerprint,
    read_bytes,
    safetensors_spans,
    stored_tensors,
)
from quantc.machine.dtypes import KNOWN_DTYPES
from quantc.pipeline import sweep
from quantc.pipeline.fingerprint import key_of
from tests.families import build
from tests.helpers import save_with_tokenizer

FAST = {"bits": 4, "group_size": 16, "method": "rtn", "calib": "none"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def change_values(file: Path) -> None:
    """Other weights, the same size and times."""
    facts = file.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert file.stat().st_size == facts.st_size
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


# While a run reads


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(bytes(8))


def replace(file: Path) -> None:
    facts = file.stat()
    shutil.copyfile(file, file.with_name("fresh"))
    os.utime(file.with_name("fresh"), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    file.with_name("fresh").replace(file)


@pytest.mark.parametrize("change", [truncate, rewrite, replace, Path.unlink])
def test_a_source_that_changes_between_two_blocks(
    change: Callable[[Path], object], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, built, build_block = model / "model.safetensors", [], sweep._build_block

    def then_change(*arguments: object) -> None:
        if built:
            change(file)
        built.append(build_block(*arguments))  # type: ignore[arg-type]

    monkeypatch.setattr(sweep, "_build_block", then_change)
    with pytest.raises(ModelError) as caught:
        quantc.quantize(model, out=tmp_path / "out", **FAST)
    message = str(caught.value)
    assert message.startswith(f"{file} changed while it was being read (")
    assert message.endswith(", so the result would mix two models; run again when nothing writes to it any more.")
    kept = f"Kept in {tmp_path / 'out.unfinished'}: 1 of 2 blocks; --resume continues from there."
    assert caught.value.__notes__ == [kept]


def test_a_source_that_changes_behind_the_last_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest would name the checksum of a file that was not quantized."""
    finish = writer.CheckpointWriter.finish_weights

    def change(*arguments: object) -> int:
        rewrite(model / "model.safetensors")
        return finish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer.CheckpointWriter, "finish_weights", change)
    with pytest.raises(ModelError, match=r"model.safetensors changed while it was being read"):
        quantc.quantize(model, out=tmp_path / "out", **FAST)


def test_a_file_that_is_cut_while_its_tensors_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped one would kill the process."""
    from quantc.frontend import unchanged

    source, read, cut = open_model(model), unchanged.read_bytes, []

    def cut_first(file: Path, start: int, count: int) -> torch.Tensor:
        if start > 8 and not cut:
            cut.append(os.truncate(file, 4096))
        return read(file, start, count)

    source.load("model.layers.0")
    monkeypatch.setattr(unchanged, "read_bytes", cut_first)
    with pytest.raises(ModelError, match=r"changed while it was being read .* now 4096 bytes"):
        source.load("model.layers.1")


def test_an_interrupt_is_not_taken_for_a_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")
    unchanged = Unchanged([tmp_path / "file"])
    with pytest.raises(KeyboardInterrupt), unchanged:
        (tmp_path / "file").write_bytes(b"afterwards")
        raise KeyboardInterrupt


# Reading


def test_tensors_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    made = {
        name: torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in KNOWN_DTYPES.items() if not name.startswith("U6")
    }
    made |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.0)}
    save_file(made, tmp_path / "t.safetensors")
    read = stored_tensors(tmp_path / "t.safetensors")
    assert read.keys() == made.keys()
    for name, tensor in made.items():
        assert read[name][...].dtype == tensor.dtype
        assert read[name][...].shape == tensor.shape
        assert torch.equal(read[name][...].float(), tensor.float())
    with pytest.raises(ModelError, match=r"t.safetensors ends 4 bytes early; fetch or save that file again\.$"):
        size = (tmp_path / "t.safetensors").stat().st_size
        read_bytes(tmp_path / "t.safetensors", size - 6, 10)


# What tells two models apart


def test_any_tensor_that_was_trained_tells(model: Path) -> None:
    file = model / "model.safetensors"
    found, tensors = open_model(model).contents(), load_file(file)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= found.keys()
    seen = {found["model.safetensors"]}
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor + 1}, file, metadata={"format": "pt"})
        seen.add(fingerprint(file, safetensors_spans(file)))
    assert len(seen) == 1 + len(tensors)


def test_samples_are_spread_over_a_tensor(tmp_path: Path) -> None:
    file, size = tmp_path / "t.safetensors", 1 << 20
    save_file({"t": torch.zeros(size, dtype=torch.uint8)}, file)
    start, before = safetensors_spans(file)[1][0], fingerprint(file, safetensors_spans(file))
    touched = 0
    for place in range(0, size, PIECE_BYTES):
        with file.open("r+b") as stream:
            stream.seek(start + place)
            stream.write(b"\1" * PIECE_BYTES)
            stream.flush()
            touched += fingerprint(file, safetensors_spans(file)) != before
            stream.seek(start + place)
            stream.write(bytes(PIECE_BYTES))
    assert PIECES <= touched <= 2 * PIECES


def test_many_tensors_cost_a_piece_each(tmp_path: Path) -> None:
    spans = [(0, 10), *((10, 4096) for _ in range(MOST_PIECES))]
    (tmp_path / "f").write_bytes(bytes(5000))
    read, original = [], os.pread
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda *arguments: (read.append(arguments), original(*arguments))[1])
        fingerprint(tmp_path / "f", spans)
    assert len(read) == 1 + MOST_PIECES


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_run_is_not_resumed_on_another_model_of_the_same_size_and_time(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.CheckpointWriter, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantc.quantize(model, out=tmp_path / "out", **FAST)
    file = model / name
    if name == "model.safetensors":
        change_values(file)
    else:
        file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=rf"with contents of {name} [0-9a-f]{{16}}, and this run has [0-9a-f]{{16}};"):
        quantc.quantize(model, out=tmp_path / "out", resume=True, **FAST)


def test_losses_on_disk_are_those_of_these_weights(model: Path) -> None:
    from quantc.driver.job import Job

    def key() -> str:
        run = Job.of({"bits": 4, "group_size": 16, "calib": "none"}, None, "cpu", None).open(open_model(model), "")
        return key_of(run, torch.zeros(1, 1, dtype=torch.int64))

    before = key()
    assert key() == before
    change_values(model / "model.safetensors")
    assert key() != before


# Whatever the locale


def test_paths_in_a_locale_of_another_encoding(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the tokenizers library is handed a path through a descriptor, and nothing tells of it."""
    quantc.quantize(original, out=tmp_path / "plain", **FAST)
    monkeypatch.setattr("quantc.files.whole_file.fsencode", lambda name: name.encode("utf-16"))
    quantc.quantize(original, out=tmp_path / "out", **FAST)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.slow  # starts a process
def test_a_run_in_the_c_locale(original: Path, tmp_path: Path) -> None:
    """Names and templates with umlauts, from the source to the checkpoint."""
    model = shutil.copytree(original, tmp_path / "größe")
    template = "{{ 'Grüße' }}{{ messages[0]['content'] }}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    places = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    environment = {**places, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [model, "--bits", "4", "--group-size", "16", "--method", "rtn", "--calib", "none", "--out", "maß-w4"]
    code = "import sys; from quantc.cli import main; main(['quantize', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "maß-w4"
    assert (out / "chat_template.jinja").read_text(encoding="utf-8") == template
    verify(out)


# GGUF


def write_gguf(file: Path) -> dict[str, torch.Tensor]:
    """A llama of one block with float32 weights; its tensors by their names in the file."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(48)
    block = {"attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {"token_embd": (48, 32), "output_norm": (32,), **{f"blk.0.{name}": shape for name, shape in block.items()}}
    made = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in made.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def test_a_gguf_file_is_read_without_mapping_and_its_samples_tell(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    made = write_gguf(file)
    source = open_model(file)
    source.load("model.layers.0")
    block = source.model.get_submodule("model.layers.0").state_dict()
    assert torch.equal(block["mlp.up_proj.weight"], made["blk.0.ffn_up.weight"])
    assert torch.equal(block["self_attn.v_proj.weight"], made["blk.0.attn_v.weight"])
    before = source.contents()
    for start, count in source.spans(file):
        content = file.read_bytes()
        with file.open("r+b") as stream:
            stream.seek(start)
            stream.write(bytes(255 - byte for byte in content[start : start + count]))
        assert fingerprint(file, source.spans(file)) != before["tiny.gguf"]
        file.write_bytes(content)
    with pytest.raises(ModelError, match=r"tiny.gguf changed while it was being read"):
        source.load("model.layers.0")


def test_a_gguf_file_that_is_cut_while_its_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    source = open_model(file)
    source.load("model.norm")
    read = StoredTensors.rows

    def cut_first(self: Any, tensor: Any, numbers: Any) -> Any:
        os.truncate(file, 16)
        return read(self, tensor, numbers)

    monkeypatch.setattr(StoredTensors, "rows", cut_first)
    with pytest.raises(ModelError, match=r"changed while it was being read .* now 16 bytes"):
        source.load("model.layers.0")
