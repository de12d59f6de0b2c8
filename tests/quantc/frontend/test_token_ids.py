"""Token ids for which the embedding has no row: told in a sentence before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken

import quantc
import quantc.api
from quantc.errors import CalibrationError
from tests.families import VOCAB, build
from tests.helpers import save_with_tokenizer, tiny_text
from tests.word_tokenizer import make_tokenizer

SAID = (
    f"the text has the token '<|new|>' (id {VOCAB}), but the model's embedding has only {VOCAB} rows; the tokenizer "
    "that belongs to the model is needed, or a text without that token."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token more than its embedding, and a text that starts with it."""
    folder = save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("ids") / "model")
    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.add_tokens([AddedToken("<|new|>", special=True)])
    tokenizer.save_pretrained(folder)
    (folder / "new.txt").write_text("<|new|> " + tiny_text())
    return folder


def test_a_calibration_text(model: Path, tmp_path: Path) -> None:
    settings = {"calib": str(model / "new.txt"), "samples": 4, "seq_len": 32}
    with pytest.raises(CalibrationError) as caught:
        quantc.quantize(model, bits=4, out=tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert str(caught.value) == SAID
    with pytest.raises(CalibrationError) as caught:
        quantc.api.plan(model, avg_bits=4, **settings)  # type: ignore[arg-type]
    assert str(caught.value) == SAID


def test_a_text_of_a_quality_target_and_of_a_curve(model: Path, tmp_path: Path) -> None:
    settings = {"calib": str(model / "text.txt"), "samples": 8, "seq_len": 32, "text": str(model / "new.txt")}
    with pytest.raises(CalibrationError) as caught:
        quantc.quantize(model, max_kl=0.1, out=tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert str(caught.value) == SAID
    with pytest.raises(CalibrationError) as caught:
        quantc.api.pareto(model, verify=1, out=tmp_path / "curve", **settings)  # type: ignore[arg-type]
    assert str(caught.value) == SAID


def test_an_evaluation_text_of_a_model_and_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    quantc.quantize(model, bits=8, method="rtn", head_bits=8, out=tmp_path / "out")
    for subject in (model, tmp_path / "out"):
        with pytest.raises(CalibrationError) as caught:
            quantc.evaluate(subject, text=str(model / "new.txt"), context=32)
        assert str(caught.value) == SAID


def test_the_text_that_a_model_writes_starts_with_a_token_it_has(model: Path, tmp_path: Path) -> None:
    folder = save_with_tokenizer(build("llama"), tmp_path / "model")
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.add_tokens([AddedToken("<|new|>", special=True)])
    tokenizer.bos_token = "<|new|>"
    core = tokenizer.backend_tokenizer
    core.post_processor = type(core.post_processor)(single="<|new|> $A", special_tokens=[("<|new|>", VOCAB)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CalibrationError) as caught:
        quantc.quantize(folder, bits=4, calib="self", samples=2, seq_len=16, out=tmp_path / "out")
    assert str(caught.value) == SAID


def test_a_token_that_no_text_has_is_no_obstacle(model: Path, tmp_path: Path) -> None:
    settings = {"calib": str(model / "text.txt"), "samples": 2, "seq_len": 32}
    quantc.quantize(model, bits=4, group_size=8, out=tmp_path / "out", **settings)  # type: ignore[arg-type]
