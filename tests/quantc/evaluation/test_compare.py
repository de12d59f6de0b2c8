"""Models compared with the first of them."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantc
from quantc.errors import UsageError
from quantc.evaluation import compare, llama_cpp, side_by_side
from quantc.evaluation.comparison import HEADS, Comparison
from quantc.recipe import Recipe
from tests.families import build
from tests.helpers import quantize_saved, tiny_text
from tests.quantc.evaluation.spoiled import BLOCKS, deep, save, spoil
from tests.word_tokenizer import make_tokenizer

SPOILED = 3
PLAIN: dict[str, Any] = {"method": "rtn", "preset": "fast", "group_size": 16}


@pytest.fixture(scope="module", autouse=True)
def quick_speed() -> Any:
    """Decode speed is measured elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "measure_decode_speed", lambda *_: 40.0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its checkpoints of 8 and 3 bits, and a copy with a spoiled block."""
    folder = tmp_path_factory.mktemp("compared")
    save(deep(), folder / "model")
    for bits in (8, 3):
        quantize_saved(folder, bits=bits, **PLAIN)
        (folder / "packed").rename(folder / f"w{bits}")
    save(spoil(deep(), f"model.layers.{SPOILED}.mlp.up_proj.weight"), folder / "spoiled")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Comparison:
    return run(folder, "model", "w8", "w3", "spoiled", blocks=True)


def run(folder: Path, *names: str, **settings: Any) -> Comparison:
    models = [folder / name for name in names]
    return quantc.compare(*models, text=str(folder / "model/text.txt"), context=32, windows=3, **settings)


# Figures


def test_fewer_bits_are_smaller_and_farther_from_the_first(found: Comparison) -> None:
    first, eight, three, _ = found.models
    assert (first.mean_kl, first.p99_kl, first.top1_agreement, first.block_errors) == (None,) * 4
    assert eight.mean_kl is not None
    assert three.mean_kl is not None
    assert 0 < 10 * eight.mean_kl < three.mean_kl
    assert first.weights_bytes > eight.weights_bytes > three.weights_bytes
    assert (first.bits_per_weight, first.runs_on, eight.runs_on) == (32, "float weights", "packed weights")
    assert (found.positions, found.windows, found.dtype) == (93, 3, "float32")


def test_figures_are_those_of_eval(folder: Path, found: Comparison) -> None:
    text = str(folder / "model/text.txt")
    alone = quantc.evaluate(folder / "w3", text=text, against=folder / "model", context=32, windows=3)
    three = found.models[2]
    assert (three.perplexity, three.mean_kl, three.p99_kl) == (alone.perplexity, alone.mean_kl, alone.p99_kl)
    assert found.models[0].perplexity == alone.perplexity_original
    assert (three.bits_per_weight, three.weights_bytes) == (alone.bits_per_weight, alone.weights_bytes)


def test_blocks_differ_from_the_spoiled_one_on(found: Comparison) -> None:
    *_, three, spoiled = found.models
    assert spoiled.block_errors is not None
    assert spoiled.block_errors[:SPOILED] == [0.0] * SPOILED
    assert min(spoiled.block_errors[SPOILED:]) > 0.01
    assert three.block_errors is not None
    assert len(three.block_errors) == BLOCKS
    assert found.block_names == [f"model.layers.{at}" for at in range(BLOCKS)]


def test_errors_are_those_of_the_hidden_states(folder: Path, found: Comparison) -> None:
    text = (folder / "model/text.txt").read_text()
    ids = torch.tensor(make_tokenizer(adds_bos=False)(text, verbose=False).input_ids[:96]).reshape(3, 32)
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("model", "spoiled")]
    with torch.no_grad():
        ours, theirs = (model(ids, output_hidden_states=True).hidden_states[SPOILED + 1] for model in models)
    errors = found.models[3].block_errors
    assert errors is not None
    expected = (ours - theirs).norm(dim=-1) / ours.norm(dim=-1)
    assert errors[SPOILED] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_rotated_hidden_states_are_compared_in_the_originals_basis(folder: Path, tmp_path: Path) -> None:
    passes = [{"allocate": {"bits": 8, "group_size": 16}}, {"rotate": {"residual": "folded"}}, "quantize"]
    recipe = Recipe.from_dict({"version": 1, "passes": passes})
    text = str(folder / "model/text.txt")
    report = quantc.quantize(
        folder / "model", out=tmp_path / "turned", recipe=recipe, calib=text, samples=4, seq_len=32
    )
    assert report.rewrites["rotate"]["residual"] == 1
    for order in ((folder / "model", tmp_path / "turned"), (tmp_path / "turned", folder / "model")):
        errors = quantc.compare(*order, text=text, context=32, windows=2, blocks=True).models[1].block_errors
        assert errors is not None
        assert max(errors) < 0.1


def test_two_models_are_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    most: list[int] = []
    load = side_by_side.load_any

    def counted(*args: Any) -> Any:
        gc.collect()
        most.append(1 + sum(model() is not None for model in loaded))
        model = load(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(side_by_side, "load_any", counted)
    run(folder, "model", "w8", "w3", "spoiled", blocks=True)
    assert most == [1, 2, 2, 2]


# Notes


def test_models_of_other_depths_have_no_errors_by_block(folder: Path, tmp_path: Path) -> None:
    save(deep(blocks=2), tmp_path / "shallow")
    text = str(folder / "model/text.txt")
    found = quantc.compare(folder / "model", tmp_path / "shallow", text=text, context=32, windows=1, blocks=True)
    assert found.models[1].block_errors is None
    assert found.models[1].mean_kl is not None
    assert found.notes == [
        f"{tmp_path / 'shallow'} has no errors by block: it has 2 decoder blocks and {folder / 'model'} {BLOCKS}"
    ]
    assert not found.has_block_errors


def test_a_model_in_another_basis_has_no_errors_by_block(folder: Path, tmp_path: Path) -> None:
    model = deep()
    with torch.no_grad():
        model.get_input_embeddings().weight.neg_()
    save(model, tmp_path / "other")
    text = str(folder / "model/text.txt")
    found = quantc.compare(folder / "model", tmp_path / "other", text=text, context=32, windows=1, blocks=True)
    assert found.models[1].block_errors is None
    assert found.notes[0].endswith(
        f"its embeddings are not {folder / 'model'}'s, as where weights were rotated or trained anew"
    )


def test_a_model_without_a_tokenizer_gets_the_tokens_of_another(folder: Path, tmp_path: Path) -> None:
    deep().save_pretrained(tmp_path / "bare")
    text = str(folder / "model/text.txt")
    found = quantc.compare(folder / "model", tmp_path / "bare", text=text, context=32, windows=1)
    assert found.models[1].mean_kl == 0
    assert found.notes == [f"{tmp_path / 'bare'} has no tokenizer that can be read; it was given another one's tokens"]


# GGUF files


def test_a_gguf_file_is_dequantized_and_its_speed_is_that_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if (why := llama_cpp.missing()) is not None:
        pytest.skip(why)
    from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
    from quantc.export.gguf.tokenizer import describe_tokenizer
    from tests.quantc.export import tiny
    from tests.quantc.export.tiny_tokenizers import TEXTS, byte_level

    tokenizer = byte_level((WORDS_OF_BYTES,), False)
    model = tiny.build("mistral", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.write_floats(model, tmp_path / "tiny.gguf", describe_tokenizer(tokenizer, len(tokenizer)))
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 3))
    found = quantc.compare(tmp_path / "model", tmp_path / "tiny.gguf", text=str(tmp_path / "text.txt"), context=64)
    assert (found.models[1].runs_on, found.models[1].speed_by) == ("dequantized weights", "llama.cpp")
    assert found.models[1].mean_kl is not None
    assert found.models[1].mean_kl < 1e-9
    assert found.table()[1][1][-1] == "dequantized weights; speed of llama.cpp"


# The result


def test_the_result_is_plain_json(found: Comparison) -> None:
    content = json.loads(json.dumps(found.to_dict(), default=str))
    assert [model["runs_on"] for model in content["models"]][:2] == ["float weights", "packed weights"]
    assert len(content["models"][3]["block_errors"]) == BLOCKS
    assert len(found.table()[0]) == len(HEADS)


def test_labels_are_whole_paths_where_names_are_alike(found: Comparison) -> None:
    assert found.labels == ["model", "w8", "w3", "spoiled"]
    alike = [model.__class__(**{**vars(model), "model": f"{at}/w4"}) for at, model in enumerate(found.models[:2])]
    assert Comparison(alike, "t", 1, 1, "float32", "").labels == ["0/w4", "1/w4"]


# What is refused


def test_one_model_is_no_comparison(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run(folder, "model")
    assert str(caught.value) == (
        "1 model was named, but a comparison needs two or more; name another, or use `quantc eval`."
    )


def test_vocabularies_of_different_sizes(folder: Path, tmp_path: Path) -> None:
    model = build("llama")
    model.resize_token_embeddings(170)
    save(model, tmp_path / "larger")
    with pytest.raises(UsageError) as caught:
        quantc.compare(folder / "w3", tmp_path / "larger", text=str(folder / "model/text.txt"))
    assert str(caught.value) == (
        f"{tmp_path / 'larger'} has a vocabulary of 170 tokens and {folder / 'w3'} one of 160, but a comparison needs "
        "one vocabulary; name models that share a tokenizer."
    )


def test_other_words_for_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    save(deep(), tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace('"w', '"v'))
    with pytest.raises(UsageError, match=r"^token \d+ is 'w\d+' in .*model and 'v\d+' in .*other, but a comparison"):
        quantc.compare(folder / "model", tmp_path / "other", text=str(folder / "model/text.txt"), context=32)


def test_a_text_that_is_missing_is_refused_before_models_are_opened() -> None:
    with pytest.raises(UsageError, match="^evaluation text 'wikitext3' is neither"):
        quantc.compare("nowhere", "nowhere/else", text="wikitext3")


def test_a_text_that_is_too_short(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(tiny_text(8))
    with pytest.raises(quantc.QuantcError, match="a single window of --context 32 needs 32 of them"):
        quantc.compare(folder / "model", folder / "w3", text=str(tmp_path / "short.txt"), context=32)
