"""tune: blocks that are trained after rounding are nearer to the original, on other text too, and never farther."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.checkpoint.reader import verify
from quantc.errors import UsageError
from quantc.passes.tune import OFFSET_RATE, TuneConfig
from quantc.report import Report
from quantc.training.reconstruction import Reconstruction, Trainable, Trained
from quantc.training.step_budget import Pace
from tests.families import build
from tests.helpers import first_blocks, quantize_saved, save_with_tokenizer, thinned

TRAINED = Path(__file__).parent.parent / "tiny_model" / "model"
TEXT = TRAINED.parent / "heldout.txt"
AT_LENGTH: dict[str, Any] = {"samples": 48, "seq_len": 128}  # of calibration: what the slow tests have


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
    calibration = {"calib": str(folder / "calib.txt"), "samples": 16, "seq_len": 64, **settings}
    return quantc.quantize(
        model,
        recipe=recipe(folder, *passes),
        out=folder / "out",
        force=True,
        **{"bits": 3, "group_size": 32, **calibration},
    )


def halves() -> tuple[str, str]:
    stories = TEXT.read_text()
    return stories[: len(stories) // 2], stories[len(stories) // 2 :]


def quantized(folder: Path, *passes: str, model: Path = TRAINED, **settings: Any) -> tuple[Report, float]:
    """The report, and the KL divergence on text that is not the calibration text."""
    report = built(folder, *passes, model=model, **settings)
    (folder / "other.txt").write_text(halves()[1])
    found = quantc.evaluate(folder / "out", text=str(folder / "other.txt"), against=model, context=128, windows=16)
    assert found.mean_kl is not None
    return report, found.mean_kl


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, float]:
    """What is not trained."""
    return quantized(tmp_path_factory.mktemp("plain"), "allocate", "quantize")


@pytest.fixture(scope="module")
def plain_at_length(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, float]:
    """The same with as much calibration text as training at full length has."""
    return quantized(tmp_path_factory.mktemp("plain"), "allocate", "quantize", **AT_LENGTH)


def test_other_text_gains_too(plain: tuple[Report, float], tmp_path: Path) -> None:
    after, tuned = quantized(tmp_path, "allocate", "quantize", "tune: {steps: 10}")
    assert tuned < 0.9 * plain[1]
    assert after.weights_bytes == plain[0].weights_bytes
    assert "tune: 4 of 4 blocks are nearer to the original" in after.notes[-2]
    assert "tune: 10 steps and " in after.notes[-1]
    verify(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 3])
def test_training_at_length_gains_more(window: int, plain_at_length: tuple[Report, float], tmp_path: Path) -> None:
    _, tuned = quantized(tmp_path, "allocate", "quantize", f"tune: {{window: {window}}}", **AT_LENGTH)
    assert tuned < 0.7 * plain_at_length[1]
    verify(tmp_path / "out")


@pytest.mark.parametrize("window", thinned([3, 1], every=2))
def test_windows_of_any_length(window: int, plain: tuple[Report, float], tmp_path: Path) -> None:
    """Longer than what is left of the model, too; what lies behind a block is not rounded by it."""
    report, tuned = quantized(tmp_path, "allocate", "quantize", f"tune: {{window: {window}, steps: 6}}")
    assert tuned < 0.95 * plain[1]
    assert "tune: 4 of 4 blocks" in report.notes[-2]
    verify(tmp_path / "out")


def test_blocks_that_are_kept_take_no_share_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paces: list[Pace] = []

    def recorded(steps: int, budget: float | None, blocks: int) -> Pace:
        assert blocks == 1
        paces.append(Pace(steps, budget, blocks))
        return paces[-1]

    pins = {f"model.layers.{index}.*": 16 for index in (0, 2, 3)}
    monkeypatch.setattr("quantc.passes.tune.Pace", recorded)
    built(tmp_path, "allocate", "quantize", "tune: {steps: 2}", pins=pins, samples=8)
    assert len(paces[-1].seconds) == 1


def test_folded_rotations_of_the_stream_leave_a_window_of_one(short: Path, tmp_path: Path) -> None:
    passes = ("allocate", "rotate: {residual: folded}", "quantize")
    _, plain = quantized(tmp_path, *passes, model=short)
    _, tuned = quantized(tmp_path, *passes, "tune: {steps: 6}", model=short)
    assert tuned < plain


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_each_part_can_be_switched_off(part: str, plain: tuple[Report, float], tmp_path: Path) -> None:
    other = "scales" if part == "codes" else "codes"
    _, tuned = quantized(tmp_path, "allocate", "quantize", f"tune: {{{other}: false, steps: 6}}")
    assert tuned < plain[1]


@pytest.mark.slow
def test_it_builds_on_rotated_scaled_and_corrected_blocks(tmp_path: Path) -> None:
    """Seen by block: these passes leave this model so little that its KL divergence is chance (0.024 to 0.028 at 2 bits
    without training, by how many threads add up)."""
    passes = ("allocate", "scale", "rotate", "quantize: {correct: 0.5, rounds: 1, shrink: 0.3}")
    report = built(tmp_path, *passes, "tune: {steps: 40}", bits=2, **AT_LENGTH)
    assert "4 of 4 blocks are nearer to the original" in report.notes[-2]
    assert float(report.notes[-2].split("squared errors ")[1].split()[0]) < 0.8
    verify(tmp_path / "out")


def test_rates_are_halved_where_a_block_gets_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    better = iter([True, False, True, False, False, True])  # the second block at once, the third never

    def recorded(_: object, trainable: Trainable, *rest: object) -> Trained:
        rates.append(trainable.groups[0].rate / OFFSET_RATE)
        return Trained(1.0, 0.5 if next(better) else 1.0)

    monkeypatch.setattr("quantc.passes.tune.train", recorded)
    report = built(tmp_path, "allocate", "quantize", "tune: {steps: 2}", samples=8)
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert "tune: 3 of 4 blocks are nearer" in report.notes[-2]
    assert "tune: 2 steps and " in report.notes[-1]


@pytest.mark.parametrize(("bits", "dtype"), [(3, torch.bfloat16), (8, torch.float32)])
def test_where_codes_are_fine_products_are_too(
    bits: int, dtype: torch.dtype, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16's rounding would outweigh that to 8 bits, and be what is trained away."""
    found: list[torch.dtype] = []

    def recorded(target: Reconstruction, *rest: object) -> Trained:
        found.append(target.dtype)
        return Trained(1.0, 0.5)

    monkeypatch.setattr("quantc.calibration.precision.has_fast_bfloat16", lambda _: True)
    monkeypatch.setattr("quantc.passes.tune.train", recorded)
    built(tmp_path, "allocate", "quantize", "tune: {steps: 2}", samples=8, bits=bits, model=short)
    assert found == [dtype] * 2


def test_the_same_run_gives_the_same_bytes(short: Path, tmp_path: Path) -> None:
    sums = []
    for _ in range(2):
        built(tmp_path, "allocate", "quantize", "tune: {steps: 2}", samples=8, model=short)
        sums.append(verify(tmp_path / "out") or (tmp_path / "out/model-00001-of-00001.safetensors").read_bytes())
    assert sums[0] == sums[1]


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma3_text", "opt"])
def test_other_kinds_of_models(family: str, tmp_path: Path) -> None:
    """Stacks of experts, weights stored the other way round, norms behind linears, biases: never worse than before."""
    (tmp_path / "model").mkdir()
    save_with_tokenizer(build(family), tmp_path / "model")
    tuned = recipe(tmp_path, "allocate", "rotate", "quantize", "tune: {steps: 4}")
    report = quantize_saved(tmp_path, recipe=tuned, bits=3, group_size=16)
    assert "blocks are nearer to the original" in report.notes[-2]
    model = quantc.load(tmp_path / "packed", dtype=torch.float32)
    assert bool(torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all())


def test_steps_and_a_budget_add_the_pass(short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="quantc"):
        report = built(tmp_path, "allocate", "quantize", tune_steps=2, samples=8, model=short)
    assert "tune: 2 steps and " in report.notes[-1]
    assert "tune: 2 steps a block, about " in caplog.text
    report = built(tmp_path, "allocate", "quantize", tune_steps=1000, tune_budget="0.001s", samples=8, model=short)
    assert "tune: 1 steps and " in report.notes[-1]
    with pytest.raises(UsageError, match=r"'soon' is no time; 90s, 10min and 1\.5h are examples"):
        built(tmp_path, "allocate", "quantize", tune_budget="soon", model=short)


def test_it_follows_quantize_and_needs_text_and_something_to_train(short: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps is 0, but training takes 1 or more"):
        TuneConfig(steps=0)
    with pytest.raises(UsageError, match="budget is 0 seconds, but training takes time"):
        TuneConfig(budget=0.0)
    with pytest.raises(UsageError, match="window is 0, but the block itself is 1"):
        TuneConfig(window=0)
    with pytest.raises(UsageError, match="trains neither codes nor scales"):
        TuneConfig(codes=False, scales=False)
    with pytest.raises(quantc.QuantcError, match="the pass tune needs"):
        built(tmp_path, "allocate", "tune", "quantize", model=short)
    report = built(tmp_path, "allocate", "quantize", "tune", calib="none", model=short)
    assert any("tune was left out" in note for note in report.notes)
