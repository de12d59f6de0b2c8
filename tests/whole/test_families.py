"""The whole job on tiny models of every decoder family: graph, quantize, write, load, same logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.formats import DENSE
from quantc.frontend import open_model, to_meta
from quantc.graph.derive import derive
from quantc.graph.model_graph import ModelGraph
from tests.families import FAMILIES, VOCAB, build
from tests.helpers import quantize_saved, save_with_tokenizer, thinned

ROUTER = "it routes tokens to experts"
TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def derived(folder: Path) -> ModelGraph:
    source = open_model(folder)
    return derive(source.model, source.load, to_meta)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_is_found_and_its_readers_are_grouped(name: str, tmp_path: Path) -> None:
    save_with_tokenizer(build(name), tmp_path)
    graph = derived(tmp_path)
    expected = FAMILIES[name].linears_per_block
    for block in graph.blocks:
        found = [linear for linear in block.linears if linear.keep in ("", "its weight is used outside its forward")]
        assert expected is None or len(found) == expected
        assert {reader for item in block.activations for reader in item.readers} == {
            item.name for item in block.linears
        }
        for item in block.activations:
            assert all(linear.shape[1] == item.width for linear in block.readers(item))


# Those of every fourth family are computed in test_families_passes.py.
@pytest.mark.parametrize("name", thinned(list(FAMILIES), every=2, at=1))
def test_quantize_write_load_gives_the_logits_of_the_rounded_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # AutoTokenizer would wrap some families' own tokenizer class around the test's words.
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)
    model = build(name)
    save_with_tokenizer(model, tmp_path / "model")
    report = quantize_saved(tmp_path, bits=4, group_size=32)
    assert report.linears
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    put_rounded_weights(model, tmp_path / "packed")
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        found = packed(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
@pytest.mark.parametrize("name", ["gemma4_shared_kv", "gemma3n_text"])
def test_presets_where_blocks_hand_on_more_than_a_hidden_state(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)
    model = build(name)
    save_with_tokenizer(model, tmp_path / "model")
    report = quantize_saved(tmp_path, preset=preset, group_size=32)
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    with torch.no_grad():
        expected = model(input_ids=TOKENS, use_cache=False).logits
        found = packed(input_ids=TOKENS, use_cache=False).logits
    assert (found - expected).norm() < 0.4 * expected.norm()  # at 4 bits; wrong keys and values are off by 1
    if preset == "best":
        after, before = re.findall(r"0\.\d+", next(note for note in report.notes if note.startswith("distill")))
        assert float(after) < float(before)


def put_rounded_weights(model: torch.nn.Module, folder: Path) -> None:
    """Replace the float model's weights by what the checkpoint's codes stand for."""
    reader = CheckpointReader(folder)
    for name, entry in reader.entries.items():
        parts = {part: reader.tensor(f"{name}.{part}") for part in entry.layout()}
        weight = DENSE.unpack(parts, entry.spec, entry.shape).effective_weight()
        whole = entry.leading or name.endswith(".weight")  # a stack, an embedding or a head goes by its parameter
        target = model.get_parameter(name) if whole else model.get_submodule(name).weight
        target.data = (
            weight if target.shape == weight.shape and not is_conv1d(model, name) else weight.transpose(-1, -2)
        )


def is_conv1d(model: torch.nn.Module, name: str) -> bool:
    return type(getattr_path(model, name)).__name__ == "Conv1D"


def getattr_path(model: torch.nn.Module, name: str) -> object:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
