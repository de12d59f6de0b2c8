"""Checkpoints made from GGUF files: their exports keep metadata, names, order of rows, and what was not changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import quantc
from quantc import api
from quantc.errors import ModelError
from quantc.evaluation import llama_cpp
from quantc.export.gguf import architectures, origin
from quantc.export.gguf.architectures import Architecture
from quantc.export.gguf.architectures.gemma2 import gain
from quantc.export.gguf.layout import FileTensor, ModelTensor
from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
from quantc.export.gguf.tokenizer import describe_tokenizer
from quantc.frontend.gguf_files import open_reader
from tests.quantc.export.tiny import MODELS, ROPE, SHARED, build, write_floats
from tests.quantc.export.tiny_tokenizers import TEXTS, byte_level

gguf = pytest.importorskip("gguf")


# Sizes that transformers takes for granted when it reads such files.
WIDE: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "num_hidden_layers": 6,
               "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "gpt2": {"vocab_size": 50257, "n_inner": 256, "n_positions": 1024},
}  # fmt: skip
NEMOTRON = Architecture(
    name="nemotron",
    model_types=("nemotron",),
    tensors={
        "model.embed_tokens": "token_embd", "model.norm": gain("output_norm"), "lm_head": "output",
        "model.layers.{}.input_layernorm": gain("blk.{}.attn_norm"),
        "model.layers.{}.post_attention_layernorm": gain("blk.{}.ffn_norm"),
        **{f"model.layers.{{}}.self_attn.{x}_proj": f"blk.{{}}.attn_{x}" for x in "qkv"},
        "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
        "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up", "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
    },
    settings=lambda config: {
        "context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": 8, "rope.freq_base": 1e4, "vocab_size": config.vocab_size,
    },
    activations=("relu2",),
)  # fmt: skip


def requantized(folder: Path, name: str, **settings: Any) -> Any:
    """A tiny model as a GGUF file of floats, quantized from there, and exported again."""
    write_floats(build(name, **settings), folder / "floats.gguf")
    quantc.quantize(folder / "floats.gguf", out=folder / "packed", bits=8, group_size=32, symmetric=True, method="rtn",
                    calib="none")  # fmt: skip
    return api.export(folder / "packed", out=folder / "again.gguf", tokenizer=False)


@pytest.mark.parametrize("name", WIDE)
def test_every_tensor_is_made_as_it_was(name: str, tmp_path: Path) -> None:
    found = requantized(tmp_path, name, **WIDE[name])
    before, after = (open_reader(tmp_path / f"{name}.gguf") for name in ("floats", "again"))
    assert found.notes[0] == f"metadata and tokenizer are those of {tmp_path / 'floats.gguf'}"
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    packed = 0
    for old, new in zip(before.tensors, after.tensors, strict=True):
        decoded = gguf.dequantize(np.asarray(new.data), new.tensor_type)
        weight = np.asarray(old.data, dtype=np.float32)
        packed += new.tensor_type.name == "Q8_0"
        limit = 0.01 if new.tensor_type.name == "Q8_0" else 0.0
        assert np.linalg.norm(decoded - weight) <= limit * np.linalg.norm(weight), new.name
    assert packed >= 8
    kept = {key: field.contents() for key, field in before.fields.items() if not key.startswith(("GGUF.", "quantc."))}
    told = {key: field.contents() for key, field in after.fields.items()}
    differing = {key for key, value in kept.items() if told.get(key) != value}
    assert differing <= {"general.file_type"}


def test_an_architecture_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", (NEMOTRON,))
        patch.setitem(
            MODELS, "nemotron", ("nemotron", {**SHARED, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}})
        )
        found = requantized(tmp_path, "nemotron")
    assert found.architecture == "nemotron"
    assert found.types["Q8_0"][0] == 12
    if llama_cpp.missing() is None:
        assert found.agreement.error < 0.04


def test_weights_that_a_pass_has_changed_go_along(tmp_path: Path) -> None:
    """The pass scale divides norms and multiplies linears; both come from the checkpoint, not from the old file."""
    tokenizer = byte_level((WORDS_OF_BYTES,), False)
    model = build("mistral", vocab_size=len(tokenizer))
    write_floats(model, tmp_path / "floats.gguf", describe_tokenizer(tokenizer, len(tokenizer)))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 4))
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\npasses:\n- allocate: {bits: 8, group_size: 32, symmetric: true}\n- scale: {}\n- quantize: {}\n"
    )
    quantc.quantize(tmp_path / "floats.gguf", out=tmp_path / "packed", recipe=tmp_path / "recipe.yaml",
                    calib=str(tmp_path / "text.txt"), samples=4, seq_len=32)  # fmt: skip
    found = api.export(tmp_path / "packed", out=tmp_path / "again.gguf")
    before, after = (
        {tensor.name: np.asarray(tensor.data) for tensor in open_reader(tmp_path / f"{name}.gguf").tensors}
        for name in ("floats", "again")
    )
    assert not np.array_equal(before["blk.0.ffn_norm.weight"], after["blk.0.ffn_norm.weight"])
    if llama_cpp.missing() is None:
        assert found.agreement.error < 0.04


@pytest.mark.parametrize("single", [True, False])
def test_rows_are_put_back_where_a_whole_row_is_needed(single: bool) -> None:
    """Some conversions reshape by the width that they know."""

    def convert(_: str, parts: list[tuple[str, np.ndarray]]) -> torch.Tensor:
        weights = parts[0][1]
        thirds = [third.reshape((2, 4, *([] if single else [8]))) for third in np.split(weights, 3)]
        return torch.from_numpy(np.stack(thirds, axis=1).reshape(weights.shape))

    shape = (24,) if single else (24, 8)
    source: Any = SimpleNamespace(convert=convert, path="old.gguf")
    part: Any = SimpleNamespace(name="blk.0.attn_qkv.weight", shape=np.array(shape[::-1]))
    change, rows = origin._undone(source, "qkv", part, ModelTensor(shape, torch.float32))
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    file = FileTensor(part.name, shape, torch.float32, "qkv", change, rows)
    assert torch.equal(file.of_floats(convert("qkv", [("", weights)])), torch.from_numpy(weights))


def test_what_cannot_be_undone_is_refused() -> None:
    source: Any = SimpleNamespace(convert=lambda _, parts: torch.from_numpy(2 * parts[0][1]), path="old.gguf")
    part: Any = SimpleNamespace(name="blk.0.ssm_a", shape=np.array([4, 8]))
    with pytest.raises(ModelError) as caught:
        origin._undone(source, "mixer.A_log", part, ModelTensor((8, 4), torch.float32))
    assert str(caught.value) == (
        "the tensor blk.0.ssm_a of old.gguf becomes mixer.A_log in a way that quantc cannot undo; this model cannot be "
        "exported."
    )


def test_without_the_file_metadata_is_made_anew(tmp_path: Path) -> None:
    write_floats(build("mistral"), tmp_path / "floats.gguf")
    quantc.quantize(
        tmp_path / "floats.gguf", out=tmp_path / "packed", bits=4, group_size=32, method="rtn", calib="none"
    )
    (tmp_path / "floats.gguf").rename(tmp_path / "elsewhere.gguf")
    found = api.export(tmp_path / "packed", tokenizer=False)
    assert found.notes[0].startswith("the GGUF file that the checkpoint was made from is not where it was")
    found = api.export(tmp_path / "packed", metadata=tmp_path / "elsewhere.gguf", tokenizer=False, force=True)
    assert found.notes[0] == f"metadata and tokenizer are those of {tmp_path / 'elsewhere.gguf'}"


def test_the_file_of_another_model(tmp_path: Path) -> None:
    write_floats(build("qwen2"), tmp_path / "floats.gguf")
    write_floats(build("mistral"), tmp_path / "other.gguf")
    quantc.quantize(
        tmp_path / "floats.gguf", out=tmp_path / "packed", bits=4, group_size=32, method="rtn", calib="none"
    )
    with pytest.raises(ModelError) as caught:
        api.export(tmp_path / "packed", metadata=tmp_path / "other.gguf", tokenizer=False)
    assert "pass --metadata with the GGUF file that the checkpoint was made from." in str(caught.value)
