"""Budgets that give the most salient rows of a linear one bit more, and where they must not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantc import api
from quantc.files import disk_cache
from quantc.plan import read_plan
from quantc.planning.budget import stored_bits
from quantc.recipe import Recipe
from quantc.sensitivity import fisher
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer, thinned

AVERAGES = (3.6, 4.1, 4.5)


@pytest.fixture(scope="module", params=thinned(["llama", "mixtral"], every=2))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide-rows")
    (folder / "model").mkdir()
    save_with_tokenizer(build(request.param), folder / "model")
    return folder


def planned(saved: Path, average: float, **settings: Any) -> api.Run:
    calibration = {"calib": str(saved / "model/text.txt"), "samples": 4, "seq_len": 32}
    return api.plan(
        saved / "model", avg_bits=average, **{"group_size": 16, "head_bits": "keep", **calibration, **settings}
    )


def two_widths(run: api.Run) -> set[str]:
    return {name for name, spec in run.plan.specs.items() if spec is not None and spec.wide_rows}


def test_a_budget_uses_them_and_is_kept(saved: Path) -> None:
    for average in AVERAGES:
        run = planned(saved, average)
        linears = run.graph.linears
        taken = sum(stored_bits(linears[name], spec) for name, spec in run.plan.specs.items() if spec is not None)
        assert taken <= average * sum(linear.weights for linear in linears.values())
        for name in two_widths(run):
            rows = run.plan.wide_rows(name)
            assert rows is not None
            assert run.plan.salience[name][rows].min() >= run.plan.salience[name][~rows].max()
            assert int(rows.sum()) % 16 == 0
    assert any(two_widths(planned(saved, average)) for average in AVERAGES)


def test_the_plan_is_the_same_from_losses_kept_on_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [planned(saved, average).plan.to_yaml() for average in AVERAGES]
    assert list(disk_cache.folder("losses").iterdir())
    monkeypatch.setattr(fisher, "measure", None)
    assert [planned(saved, average).plan.to_yaml() for average in AVERAGES] == first


@pytest.mark.parametrize("saved", thinned(["mixtral", "llama"], every=2), indirect=True)
def test_what_is_built_within_a_budget_is_what_its_plan_builds(saved: Path) -> None:
    budget = quantize_saved(saved, avg_bits=4.1, group_size=16, force=True)
    weights = (saved / "packed/model-00001-of-00001.safetensors").read_bytes()
    plan = saved / "packed/plan.yaml"
    assert any(spec and spec.wide_rows for spec in read_plan(plan).specs.values())
    again = quantize_saved(saved, plan=plan, force=True)
    assert (saved / "packed/model-00001-of-00001.safetensors").read_bytes() == weights
    assert again.weights_bytes == budget.weights_bytes


def test_pins_formats_targets_and_other_estimators_have_none(saved: Path) -> None:
    pinned = planned(saved, 4.5, pins={"*_proj": 3})
    assert not {name for name in two_widths(pinned) if name.endswith("_proj")}
    assert not two_widths(planned(saved, 4.5, formats=["w3g16", "w4g16", "w5g16"]))
    assert not two_widths(planned(saved, 5.5, target="vllm", group_size=None, symmetric=True))
    passes = [{"allocate": {"estimator": "gram"}}, "quantize"]
    assert not two_widths(planned(saved, 4.5, recipe=Recipe.from_dict({"version": 1, "passes": passes})))
