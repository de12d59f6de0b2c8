"""distill: scales trained on the original's predictions, kept only where held-out text gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.checkpoint.reader import verify
from quantc.errors import UsageError
from quantc.passes import distill
from quantc.passes.distill import DistillConfig
from quantc.report import Report
from tests.families import build
from tests.helpers import first_blocks, quantize_saved, save_with_tokenizer

TRAINED = Path(__file__).parent.parent / "tiny_model" / "model"
TEXT = TRAINED.parent / "heldout.txt"


def recipe(folder: Path, *passes: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text("version: 1\npasses:\n" + "".join(f"- {item}\n" for item in passes))
    return file


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is no better or worse for less of the model."""
    return first_blocks(TRAINED, 2, tmp_path_factory.mktemp("short") / "model")


def built(folder: Path, *passes: str, model: Path = TRAINED, **settings: Any) -> Report:
    """Quantize a model into `folder`/out, calibrated on half of its text."""
    (folder / "calib.txt").write_text(halves()[0])
    how = {"calib": str(folder / "calib.txt"), "samples": 16, "seq_len": 64, "bits": 3, "group_size": 32, **settings}
    return quantc.quantize(model, recipe=recipe(folder, *passes), out=folder / "out", force=True, **how)


def halves() -> tuple[str, str]:
    stories = TEXT.read_text()
    return stories[: len(stories) // 2], stories[len(stories) // 2 :]


def quantized(folder: Path, *passes: str, **settings: Any) -> tuple[Report, float]:
    """The report, and the KL divergence on text that is not the calibration text."""
    report = built(folder, *passes, **settings)
    (folder / "other.txt").write_text(halves()[1])
    found = quantc.evaluate(folder / "out", text=str(folder / "other.txt"), against=TRAINED, context=128, windows=16)
    assert found.mean_kl is not None
    return report, found.mean_kl


def weights(folder: Path) -> bytes:
    return (folder / "out/model-00001-of-00001.safetensors").read_bytes()


SPARSE: dict[str, Any] = {"sparsity": 0.2, "group_size": 16, "bits": 4}
AT_LENGTH: dict[str, Any] = {"samples": 48, "seq_len": 128}


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        pytest.param(8, {}, id="dense"),
        pytest.param(20, AT_LENGTH, id="dense at length", marks=pytest.mark.slow),
        pytest.param(20, AT_LENGTH | SPARSE, id="sparse at length", marks=pytest.mark.slow),
    ],
)
def test_other_text_gains_too(steps: int, settings: dict[str, Any], tmp_path: Path) -> None:
    before, plain = quantized(tmp_path, "allocate", "quantize", **settings)
    after, trained = quantized(tmp_path, "allocate", "quantize", f"distill: {{steps: {steps}}}", **settings)
    assert trained < 0.95 * plain
    assert after.weights_bytes == before.weights_bytes
    assert after.notes[-1].startswith("distill: KL divergence on held-out text 0.")
    verify(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*actors*"))


def test_what_gets_worse_is_not_kept(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tmp_path, "allocate", "quantize", samples=8, model=short)
    before = weights(tmp_path)
    monkeypatch.setattr(distill, "RATE", 3.0)
    built(tmp_path, "allocate", "quantize", "distill: {steps: 2}", samples=8, model=short)
    assert weights(tmp_path) == before


def test_the_same_run_gives_the_same_bytes(short: Path, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        built(tmp_path, "allocate", "quantize", "distill: {steps: 2}", samples=8, model=short)
        found.append(weights(tmp_path))
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3_text", "opt", "zamba2"])
def test_other_kinds_of_models_and_every_pass_before_it(family: str, tmp_path: Path) -> None:
    """Experts, weights stored the other way round, norms behind linears, biases, scaled inputs, shared weights."""
    (tmp_path / "model").mkdir()
    save_with_tokenizer(build(family), tmp_path / "model")
    passes = ("allocate", "scale", "rotate", "quantize", "tune: {steps: 2}", "distill: {steps: 4}")
    report = quantize_saved(tmp_path, recipe=recipe(tmp_path, *passes), bits=3, group_size=16)
    assert report.notes[-1].startswith("distill: KL divergence on held-out text")
    after, before = (float(word.rstrip(",")) for word in report.notes[-1].split() if word[0].isdecimal())
    assert after <= before
    model = quantc.load(tmp_path / "packed", dtype=torch.float32)
    assert bool(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())


def test_it_follows_quantize_and_needs_text_and_rotations_online(short: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps is 0, but training takes 1 or more"):
        DistillConfig(steps=0)
    with pytest.raises(quantc.QuantcError, match="the pass distill needs"):
        built(tmp_path, "allocate", "distill", "quantize", model=short)
    report = built(tmp_path, "allocate", "quantize", "distill", calib="none", model=short)
    assert any("distill was left out" in note for note in report.notes)
    folded = ("allocate", "rotate: {residual: folded}", "quantize", "distill")
    report = built(tmp_path, *folded, samples=8, model=short)
    assert "the residual stream is rotated by the weights" in report.refused["distill"]
