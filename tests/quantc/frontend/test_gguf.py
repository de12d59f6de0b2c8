"""GGUF files in several parts, and what their headers say of completeness."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import quantc
from quantc.errors import ModelError
from quantc.export.gguf.blocks import TYPES
from quantc.frontend import open_model
from quantc.frontend.gguf import GgufSource, _open_parts

gguf = pytest.importorskip("gguf")
WIDTH, VOCABULARY = 32, 40


def tensors(head: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (48, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (WIDTH, 48)}
        shapes |= {f"blk.{block}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"output": (VOCABULARY, WIDTH)} if head else {}  # comes last, so that it lies in the last part
    return {f"{name}.weight": 0.2 * random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write(file: Path, per_part: int = 0, head: bool = True, left_out: str = "", more: str = "") -> None:
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=per_part)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    found = {name: values for name, values in tensors(head).items() if name != left_out}
    for name, values in (found | ({more: np.ones(4, dtype=np.float32)} if more else {})).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None], use_cache=False).logits


@pytest.mark.parametrize("head", [True, False])
def test_parts_are_read_as_one_file(head: bool, tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", head=head)
    write(tmp_path / "split.gguf", per_part=8, head=head)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) == 3
    expected = logits(open_model(tmp_path / "tiny.gguf").load_whole(torch.float32))
    for part in parts:
        source = open_model(part)
        assert source.name == "split"
        assert source.weight_files() == parts
        assert source.notes == []
        assert torch.equal(logits(source.load_whole(torch.float32)), expected)
    quantc.quantize(parts[1], bits=8, group_size=8, method="rtn", out=tmp_path / "out")
    found = logits(quantc.load(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_part_that_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "split.gguf", per_part=8)
    first, second, third = sorted(tmp_path.glob("split-*.gguf"))
    second.unlink()
    with pytest.raises(ModelError) as caught:
        open_model(third)
    assert str(caught.value) == (
        f"{third} is one of 3 parts, but not all are beside it: split-00002-of-00003.gguf missing; fetch the rest."
    )
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "renamed.gguf")
    assert str(caught.value) == (
        f"{tmp_path / 'renamed.gguf'} is one of 3 parts, but 1 were found by their names; give all parts their names "
        "back, such as name-00001-of-00002.gguf."
    )


def test_a_tensor_that_is_missing_is_found_at_the_start(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", left_out="blk.1.ffn_down.weight")
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "tiny.gguf")
    assert str(caught.value) == (
        f"{tmp_path / 'tiny.gguf'}: the tensor model.layers.1.mlp.down_proj.weight is not in the file; a complete GGUF "
        "file is needed, so fetch it again."
    )


def test_a_tensor_that_the_model_does_not_take(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", more="rope_freqs.weight")
    assert open_model(tmp_path / "tiny.gguf").notes == [
        "tensors of the file are no part of the model and were left out: rope_freqs.weight"
    ]


def test_a_table_is_decoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, decoding 6-bit blocks takes five times the values."""
    monkeypatch.setattr("quantc.frontend.gguf.PIECE", 1 << 16)
    kind = TYPES["Q6_K"]
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (4000, kind.row_bytes(1024)), generator=draw).to(torch.uint8)
    rows.view(4000, 4, kind.block_bytes)[..., -1] = 0x1C  # scales are small numbers
    writer = gguf.GGUFWriter(tmp_path / "table.gguf", "llama")
    writer.add_tensor("token_embd.weight", rows.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = object.__new__(GgufSource)
    source.reader, source._file_of = _open_parts([tmp_path / "table.gguf"])
    tracemalloc.start()
    found = source._dequantize(source.reader.tensors[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * found.nbytes
    assert np.array_equal(found, kind.values(kind.unpack(rows)).numpy())
