"""Packed embeddings and heads whose rows change: floats with the same values, for transformers to do with as usual."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import quantc
from quantc.checkpoint.integrity import REMEDY
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import CheckpointError
from quantc.runtime.layers import PackedWeight
from quantc.runtime.tables import unpack_tables
from tests.families import VOCAB, build
from tests.helpers import save_with_tokenizer

TOKENS = torch.tensor([[3, 17, 42, 99, 3, 7, 120, 64]])
TIED = {"qwen2", "gpt2"}
MODELS = ["qwen2", "llama", "gpt2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed checkpoints, embedding and head in 8 bits, by the model's name."""
    folder = tmp_path_factory.mktemp("tables")
    for name in MODELS:
        save_with_tokenizer(build(name), folder / f"{name}-float")
        settings = {"bits": 4, "head_bits": 8, "group_size": 32, "method": "rtn"}
        quantc.quantize(folder / f"{name}-float", out=folder / name, **settings)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    return quantc.load(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_a_larger_table_keeps_its_rows(folder: Path, tmp_path: Path, name: str) -> None:
    model = loaded(folder / name)
    before, rows = logits(model), model.get_input_embeddings()(TOKENS)
    embedding = model.resize_token_embeddings(VOCAB + 5, pad_to_multiple_of=8)
    assert embedding.weight.shape[0] == model.config.vocab_size == VOCAB + 8
    assert torch.equal(embedding(TOKENS), rows)
    after = logits(model)
    torch.testing.assert_close(after[..., :VOCAB], before, rtol=1e-5, atol=1e-5)
    assert (model.get_output_embeddings().weight is embedding.weight) == (name in TIED)
    model.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert torch.equal(logits(again), after)
    packed = CheckpointReader(tmp_path / "again").entries
    assert packed == {
        key: entry for key, entry in CheckpointReader(folder / name).entries.items() if ".weight" not in key
    }


def test_what_changes_no_row_unpacks_nothing(folder: Path) -> None:
    model = loaded(folder / "qwen2")
    before = logits(model)
    for arguments in ((), (VOCAB,), (None, 8), (VOCAB - 3, 8)):
        embedding = model.resize_token_embeddings(*arguments)
        assert embedding is model.get_input_embeddings()
    model.set_input_embeddings(model.get_input_embeddings())
    assert isinstance(model.get_input_embeddings().weight, PackedWeight)
    assert torch.equal(logits(model), before)


def test_an_embedding_can_be_asked_what_a_tensor_can(folder: Path) -> None:
    weight = loaded(folder / "qwen2").get_input_embeddings().weight
    assert (weight.size(), weight.size(0), weight.shape) == ((VOCAB, 64), VOCAB, (VOCAB, 64))
    assert (weight.dtype, weight.device, weight.requires_grad) == (torch.float32, torch.device("cpu"), False)
    with pytest.raises(CheckpointError, match=r"call quantc.runtime.tables.unpack_tables\(model\) first"):
        weight.data[0] = 1


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_another_embedding_is_taken_and_tied_again(folder: Path, name: str) -> None:
    model = loaded(folder / name)
    other = nn.Embedding(VOCAB, model.config.hidden_size)
    model.set_input_embeddings(other)
    model.tie_weights()
    assert model.get_input_embeddings() is other
    assert (model.get_output_embeddings().weight is other.weight) == (name in TIED)


def test_tables_in_floats_can_be_trained_and_copied(folder: Path) -> None:
    model = loaded(folder / "qwen2")
    unpack_tables(model)
    unpack_tables(model)
    model.get_input_embeddings().weight.requires_grad_()
    twin = copy.deepcopy(model)
    twin(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert twin.get_output_embeddings().weight.grad.abs().sum() > 0
    assert model.get_input_embeddings().weight.grad is None


def test_a_saved_copy_is_refused_without_quantc_too(folder: Path, tmp_path: Path) -> None:
    loaded(folder / "llama").save_pretrained(tmp_path)
    assert CheckpointReader(tmp_path).config["transformers_weights"] == REMEDY


def test_float_models_of_the_class_are_as_before(folder: Path, tmp_path: Path) -> None:
    loaded(folder / "llama")
    model = build("llama")
    assert model.resize_token_embeddings(VOCAB + 8).weight.shape[0] == VOCAB + 8
    model.save_pretrained(tmp_path)
    assert "transformers_weights" not in (tmp_path / "config.json").read_text()


def test_a_model_without_a_single_parameter_generates_and_is_measured(tmp_path: Path) -> None:
    """OLMo norms have no weights: with embedding and head packed nothing is left that has a device for transformers."""
    folder = save_with_tokenizer(build("olmo"), tmp_path / "model")
    quantc.quantize(folder, bits=4, group_size=16, method="rtn", out=tmp_path / "packed")
    model = loaded(tmp_path / "packed")
    assert next(model.parameters(), None) is None
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).shape[1] > TOKENS.shape[1]
    found = quantc.evaluate(tmp_path / "packed", against=folder, text=str(folder / "text.txt"), windows=1)
    assert found.mean_kl is not None
