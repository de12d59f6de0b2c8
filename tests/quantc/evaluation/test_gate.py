"""A model held against limits, and what is named where it exceeds one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.errors import UsageError
from quantc.evaluation import blame
from quantc.evaluation.blame import heaviest
from quantc.evaluation.gate import Verdict
from quantc.recipe import Recipe
from tests.helpers import quantize_saved
from tests.quantc.evaluation.spoiled import BLOCKS, deep, save, spoil

BLOCK, LINEAR = "model.layers.4", "model.layers.4.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, one with a spoiled linear as floats and in 8 bits, and one whose embedding is spoiled."""
    folder = tmp_path_factory.mktemp("gate")
    save(deep(), folder / "model")
    quantize_saved(folder, bits=8, method="rtn", preset="fast", group_size=16)
    (folder / "packed").rename(folder / "good")
    for name, weight in (("spoiled", f"{LINEAR}.weight"), ("outside", "model.embed_tokens.weight")):
        save(spoil(deep(), weight, 0.2), folder / name)
    (folder / "other").mkdir()
    (folder / "other/model").symlink_to(folder / "spoiled")
    quantize_saved(folder / "other", bits=8, method="rtn", preset="fast", group_size=16)
    return folder


def check(folder: Path, name: str, original: str = "model", **limits: float) -> Verdict:
    text = str(folder / "model/text.txt")
    return quantc.check(folder / name, against=folder / original, text=text, context=32, windows=3, **limits)


def test_limits_that_hold(folder: Path) -> None:
    verdict = check(folder, "good", max_kl=0.01, max_ppl_increase=0.05)
    assert verdict.passed
    assert verdict.blame is None
    assert [(held.name, held.limit, held.holds) for held in verdict.limits] == [
        ("max_kl", 0.01, True),
        ("max_ppl_increase", 0.05, True),
    ]


def test_figures_are_those_of_eval(folder: Path) -> None:
    verdict = check(folder, "spoiled", max_kl=100, max_ppl_increase=1e-6)
    text = str(folder / "model/text.txt")
    found = quantc.evaluate(folder / "spoiled", text=text, against=folder / "model", context=32, windows=3)
    kl, increase = verdict.limits
    assert (kl.measured, kl.holds) == (found.mean_kl, True)
    assert found.perplexity_original is not None
    assert increase.measured == pytest.approx(found.perplexity / found.perplexity_original - 1)
    assert increase.holds == (increase.measured <= 1e-6)


@pytest.mark.parametrize("name", ["spoiled", "other/packed"])
def test_the_spoiled_block_and_linear_are_named(folder: Path, name: str) -> None:
    verdict = check(folder, name, max_kl=1e-4)
    assert not verdict.passed
    found = verdict.blame
    assert found is not None
    assert found.blocks[0].name == BLOCK
    assert found.linears[0].name == LINEAR
    for worst in (found.blocks[0], found.linears[0]):
        assert worst.before == pytest.approx(verdict.scores.mean_kl)
        assert worst.after < 0.05 * worst.before
        assert worst.alone > 0.9 * worst.before
    assert len(found.blocks) == len(found.linears) == 1  # the others lose nothing beside it
    assert found.evaluations < 30
    assert found.predictions == 93
    assert found.notes == []


def test_a_spoiled_embedding_is_named(folder: Path) -> None:
    found = check(folder, "outside", max_kl=1e-4).blame
    assert found is not None
    assert [part.name for part in found.blocks] == ["the embedding and the head"]
    assert found.blocks[0].after == 0
    assert found.linears == []


def test_linears_of_a_checkpoint_with_scaled_channels(tmp_path: Path) -> None:
    model = spoil(deep(), f"{LINEAR}.weight", 0.2)
    save(model, tmp_path / "model")
    save(deep(), tmp_path / "original")
    passes = [{"allocate": {"bits": 6, "group_size": 16}}, "scale", "quantize"]
    text = str(tmp_path / "model/text.txt")
    recipe = Recipe.from_dict({"version": 1, "passes": passes})
    report = quantc.quantize(
        tmp_path / "model", out=tmp_path / "packed", recipe=recipe, calib=text, samples=4, seq_len=32
    )
    assert report.rewrites["scale"]
    verdict = quantc.check(
        tmp_path / "packed", against=tmp_path / "original", text=text, max_kl=1e-4, context=32, windows=3
    )
    found = verdict.blame
    assert found is not None
    assert (found.blocks[0].name, found.linears[0].name) == (BLOCK, LINEAR)
    assert found.linears[0].after < 0.2 * found.linears[0].before


def test_damage_outside_linears_is_not_put_down_to_them(folder: Path, tmp_path: Path) -> None:
    save(spoil(deep(), f"{BLOCK}.input_layernorm.weight", 2.0), tmp_path / "norm")
    (tmp_path / "model").symlink_to(folder / "model")
    found = check(tmp_path, "norm", max_kl=1e-4).blame
    assert found is not None
    assert found.blocks[0].name == BLOCK
    assert found.linears == []
    assert found.notes == [
        f"the loss of {BLOCK} is not due to single linears: other weights differ too, or they were rotated or scaled "
        "together"
    ]


def test_a_model_of_another_depth_is_checked_and_no_more(folder: Path, tmp_path: Path) -> None:
    save(deep(blocks=2), tmp_path / "shallow")
    (tmp_path / "model").symlink_to(folder / "model")
    found = check(tmp_path, "shallow", max_kl=1e-4).blame
    assert found is not None
    assert found.blocks == []
    assert found.notes == [
        f"what loses most in {tmp_path / 'shallow'} was not looked for: it has 2 decoder blocks and the original "
        f"{BLOCKS}"
    ]


def test_predictions_that_are_not_finite_with_a_part_restored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, calls = blame.score, [0]

    def sometimes(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise blame.CalibrationError("the logits are NaN; try --dtype float32.")
        return score(*args)

    monkeypatch.setattr(blame, "score", sometimes)
    found = check(folder, "spoiled", max_kl=1e-4).blame
    assert found is not None
    assert found.blocks


# Limits


def test_no_limit() -> None:
    with pytest.raises(UsageError) as caught:
        quantc.check("nowhere", against="nowhere", text="nowhere.txt")
    assert str(caught.value) == "no limit was given; pass --max-kl 0.05, --max-ppl-increase 2%, or both."


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_limits_are_more_than_nothing(value: float) -> None:
    with pytest.raises(UsageError, match=f"^--max-kl is {value:g}, but a limit is more than 0; 0.05 is an example.$"):
        quantc.check("nowhere", against="nowhere", text="nowhere.txt", max_kl=value)


def test_the_verdict_is_plain_json(folder: Path) -> None:
    content = json.loads(json.dumps(check(folder, "spoiled", max_kl=1e-4).to_dict()))
    assert content["passed"] is False
    assert content["blame"]["linears"][0]["name"] == LINEAR
    assert content["limits"][0]["measured"] == content["scores"]["mean_kl"]


# The search


def measured(losses: list[float]) -> tuple[dict[int, float], int]:
    """Return what is found where losses of single items add up, and how many measurements that took."""
    calls = [0]

    def loss(start: int, end: int) -> float:
        calls[0] += 1
        return sum(losses[start:end])

    return heaviest(sum(losses), len(losses), loss), calls[0]


@pytest.mark.parametrize("at", [0, 13, 31])
def test_one_item_that_loses_all_takes_twice_the_logarithm(at: int) -> None:
    found, calls = measured([1.0 if item == at else 1e-4 for item in range(32)])
    assert list(found) == [at]
    assert calls == 10


def test_the_worst_come_first() -> None:
    losses = [0.01] * 32
    losses[3], losses[20], losses[21] = 1.0, 3.0, 2.0
    found, calls = measured(losses)
    assert list(found.items()) == [(20, pytest.approx(3.0)), (21, pytest.approx(2.0)), (3, pytest.approx(1.0))]
    assert calls < 24


def test_losses_that_are_spread_end_after_few_measurements() -> None:
    generator = torch.Generator().manual_seed(0)
    found, calls = measured((1 + 0.2 * torch.rand(80, generator=generator)).tolist())
    assert 1 <= len(found) <= 3
    assert calls <= 4 * 7 + 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_items(count: int) -> None:
    found, _ = measured([float(item + 1) for item in range(count)])
    assert next(iter(found)) == count - 1


def test_infinite_losses_do_not_confuse_it() -> None:
    found, _ = measured([math.inf if item == 2 else 1.0 for item in range(5)])
    assert next(iter(found)) == 2
