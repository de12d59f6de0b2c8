"""Quality targets: met by measuring, within so many builds; out of reach is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.budget import Shared
from quantc.checkpoint import CheckpointReader, verify
from quantc.errors import UsageError
from quantc.numerics.allocation import Infeasible
from quantc.report import read_report
from quantc.targets import HELD_OUT_SHARE, ROUNDS, Target, held_out, meet

MODEL = Path(__file__).parent.parent / "tiny_model" / "model"
TEXT = MODEL.parent / "heldout.txt"


class Curve:
    """A budget whose plans of B bits are predicted to lose 4^-B, B in quarters from 2 to 8."""

    def __init__(self) -> None:
        self.plans = [self.plan(quarter) for quarter in range(8, 33)]
        self.most = self.plans[-1].bits

    @staticmethod
    def plan(quarter: int) -> Shared:
        return Shared({"a": None, f"{quarter}": None}, {"a": 4.0 ** -(quarter / 4)}, quarter)

    def smallest(self, loss: float) -> Shared:
        for plan in self.plans:
            if plan.loss <= loss:
                return plan
        raise Infeasible(0)

    def share(self, bits: int) -> Shared:
        return next(plan for plan in self.plans if plan.bits == bits)


def pursue(target: Target, measured: Callable[[Shared], float]) -> tuple[Any, list[Shared]]:
    built: list[Shared] = []

    def build(shared: Shared) -> float:
        built.append(shared)
        return measured(shared)

    return meet(target, Curve(), build), built  # type: ignore[arg-type]


@pytest.mark.parametrize("off_by", [0.4, 0.7, 1.0, 2.0, 10.0])
def test_a_target_is_met_closely_when_predictions_are_off_by_a_factor(off_by: float) -> None:
    rounds, built = pursue(Target(max_kl=0.02), lambda shared: shared.loss * off_by)
    assert len(built) <= 2
    assert 0.6 * 0.02 < rounds[-1].found <= 0.02


@pytest.mark.parametrize("power", [0.6, 1.4])
def test_a_target_is_met_closely_when_predictions_are_off_by_a_power(power: float) -> None:
    rounds, _ = pursue(Target(max_kl=0.02), lambda shared: 5 * shared.loss**power)
    assert 0.5 * 0.02 < rounds[-1].found <= 0.02


def test_of_what_meets_the_target_the_smallest_is_taken() -> None:
    found = {0: 0.001, 1: 0.03, 2: 0.012}
    rounds, built = pursue(Target(max_kl=0.02), lambda shared: found.pop(min(found)))
    assert len(built) == ROUNDS
    assert rounds[-1].found == 0.012
    assert rounds[-1].shared.bits == min(built[0].bits, built[2].bits)


def test_out_of_reach_names_the_best_found() -> None:
    with pytest.raises(
        UsageError, match=r"cannot be met within 8 bits: a KL divergence of 0.300 is the best found, and"
    ):
        pursue(Target(max_kl=0.02), lambda shared: 0.3)
    with pytest.raises(
        UsageError, match=r"a perplexity 5.00 % higher is the best found, and at most a perplexity 2.00"
    ):
        pursue(Target(max_ppl_increase=0.02), lambda shared: 0.048790164)


@pytest.mark.parametrize("samples", [8, 20, 64])
def test_an_eighth_of_the_windows_is_kept_aside(samples: int) -> None:
    tokens = torch.arange(samples * 4).reshape(samples, 4)
    kept, windows = held_out(None, tokens, None)  # type: ignore[arg-type]
    aside = torch.stack([window.tokens for window in windows])
    assert len(aside) == pytest.approx(samples / HELD_OUT_SHARE, abs=0.6)
    assert sorted([*kept.flatten().tolist(), *aside.flatten().tolist()]) == list(range(samples * 4))


@pytest.mark.parametrize(
    ("wanted", "low", "high"), [({"max_kl": 0.03}, 0.015, 0.03), ({"max_ppl_increase": 0.02}, 0.0, 0.02)]
)
def test_a_model_meets_its_target(wanted: dict[str, float], low: float, high: float, tmp_path: Path) -> None:
    settings = {"calib": str(TEXT), "samples": 32, "seq_len": 64, **wanted}
    report = quantc.quantize(MODEL, out=tmp_path / "out", text=str(TEXT), **settings)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    verify(tmp_path / "out")
    assert read_report(tmp_path / "out")["notes"][-1] == report.notes[-1]
    figures = [float(word) for word in report.notes[-1].replace(",", "").split() if word[0].isdigit()]
    scale = 1 if "max_kl" in wanted else 100
    assert low * scale < figures[0] <= high * scale == figures[1]
    found = quantc.evaluate(tmp_path / "out", text=str(TEXT), against=MODEL, context=64, windows=32)
    assert found.mean_kl is not None
    assert found.perplexity_original is not None
    increase = 100 * (found.perplexity / found.perplexity_original - 1)
    assert figures[0] == pytest.approx(found.mean_kl if "max_kl" in wanted else increase, rel=1e-2)


def test_the_head_is_quantized_and_a_size_in_the_recipe_has_no_say(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [{allocate: {size: 1000000, head_bits: 8}}, quantize]\n")
    settings = {"calib": str(TEXT), "samples": 16, "seq_len": 48, "recipe": recipe}
    quantc.quantize(MODEL, out=tmp_path / "out", max_kl=0.1, **settings)  # type: ignore[arg-type]
    assert CheckpointReader(tmp_path / "out").entries["model.embed_tokens.weight"].spec.bits == 8


def test_contradictions_are_refused_and_nothing_is_left_behind(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_kl": 0.1, "bits": 4}, "a quality target decides how many bits there are, so bits has no say"),
        ({"max_kl": 0.1, "max_ppl_increase": 0.1}, "two targets; leave one of them out"),
        ({"max_kl": -1.0}, "a target is more than 0"),
        ({"bits": 4, "text": "t.txt"}, "a text is what a quality target is measured on"),
        ({"max_kl": 1e-9, "samples": 8, "seq_len": 32, "calib": str(TEXT)}, "cannot be met within 8 bits"),
        ({"max_kl": 0.1, "samples": 4, "seq_len": 32, "calib": str(TEXT)}, "4 calibration samples are too few"),
    ]
    for settings, message in cases:
        with pytest.raises(UsageError, match=message):
            quantc.quantize(MODEL, out=tmp_path / "out", **settings)
        assert list(tmp_path.iterdir()) == []
