"""Every type that gguf-py decodes is a source of weights; the others are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import quantc
from quantc.errors import ModelError
from quantc.frontend import open_model
from quantc.frontend.gguf_types import _is_decoded
from tests.quantc.frontend.tiny_gguf import Blocks, gguf, tensors, write

WIDTH = 256  # a block of the widest types
KINDS = [kind for kind in gguf.GGMLQuantizationType if _is_decoded(kind)]
OTHERS = [kind for kind in gguf.GGMLQuantizationType if not _is_decoded(kind)]
WEIGHTS = {  # of the file, and of the model, those that transformers leaves in the file's order
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
}


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int) -> np.ndarray:
    """Random bytes (rows, bytes of a row) whose values are finite and of a weight's size."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(int(kind)).integers(0, 256, (60_000 // size, width), dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(drawn, kind)
    usable = drawn[np.isfinite(values).all(1) & (np.abs(values).max(1) < 1e3)]
    count = rows * WIDTH // size
    assert len(usable) > 20
    return np.resize(usable, (count, width)).reshape(rows, -1)


def write_kind(file: Path, kind: gguf.GGMLQuantizationType) -> dict[str, Blocks]:
    """Write a model with two weights of a type, and return these."""
    found = tensors(width=WIDTH, inner=WIDTH)
    blocks = {name: (random_blocks(kind, found[name].shape[0]), kind) for name in WEIGHTS}
    write(file, found, blocks=blocks)
    return blocks


def test_all_types_of_llama_cpp_files_are_decoded() -> None:
    assert {kind.name for kind in KINDS} >= {
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
        "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_weight_is_what_the_package_decodes(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantc.numerics.strips.STRIP", 7 * WIDTH)
    blocks = write_kind(tmp_path / "tiny.gguf", kind)
    source = open_model(tmp_path / "tiny.gguf")
    assert source.notes == []
    for stored, name in WEIGHTS.items():
        expected = torch.from_numpy(np.array(gguf.dequantize(*blocks[stored])))
        source.load(name)
        assert torch.equal(source.model.get_parameter(name), expected)
        assert torch.equal(torch.cat(list(source.strips(name))), expected)
        assert source.stored_bits(name) == 8 * blocks[stored][0].nbytes / expected.numel()
        written = expected.to(source.stored_dtype(name)).float()
        assert (written - expected).abs().max() <= 2**-11 * expected.abs().max()


@pytest.mark.parametrize("name", ["IQ2_XS", "TQ1_0", "MXFP4"])
def test_a_file_of_a_type_is_quantized(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    blocks = write_kind(tmp_path / "tiny.gguf", kind)
    quantc.quantize(tmp_path / "tiny.gguf", bits=8, group_size=32, method="rtn", head_bits="keep", out=tmp_path / "out")
    model = quantc.load(tmp_path / "out", dtype=torch.float32)
    expected = torch.from_numpy(np.array(gguf.dequantize(*blocks["token_embd.weight"])))
    found = model.get_parameter("model.embed_tokens.weight")
    assert (found - expected).abs().max() <= 2**-11 * expected.abs().max()


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_a_type_that_is_not_decoded_is_refused_before_work(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    found = tensors(width=WIDTH, inner=WIDTH)
    size, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = {"blk.1.ffn_up.weight": (np.zeros((WIDTH, WIDTH // size * width), dtype=np.uint8), kind)}
    write(tmp_path / "tiny.gguf", found, blocks=blocks)
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "tiny.gguf")
    assert str(caught.value).startswith(
        f"{tmp_path / 'tiny.gguf'}: blk.1.ffn_up.weight is stored as {kind.name}, which the package gguf "
    )
    assert str(caught.value).endswith(" does not decode; use a file of another type.")


def test_a_type_of_a_later_version_is_refused_by_its_number(tmp_path: Path) -> None:
    (file,) = write(tmp_path / "tiny.gguf")
    content = bytearray(file.read_bytes())
    place = content.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 2 * 8
    assert content[place : place + 4] == bytes(4)  # F32
    content[place] = 250
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        open_model(file)
    assert str(caught.value) == (
        f"{file}: the tensor blk.1.ffn_up.weight has type 250, which this version of the package gguf does not know; "
        "run `pip install --upgrade gguf`, or use a file of another type."
    )


@pytest.mark.parametrize("ending", [".scale", ".weight.scale"])
def test_scales_in_tensors_of_their_own_are_refused(ending: str, tmp_path: Path) -> None:
    (file,) = write(tmp_path / "tiny.gguf", tensors() | {f"blk.0.ffn_down{ending}": np.ones(1, dtype=np.float32)})
    with pytest.raises(ModelError) as caught:
        open_model(file)
    assert str(caught.value) == (
        f"{file}: blk.0.ffn_down.weight is multiplied by blk.0.ffn_down{ending}, which transformers does not read; use "
        "a file of another type, or the model's transformers folder."
    )
