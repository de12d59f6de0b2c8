"""Averages of bits: kept to the bit, shared out by loss, refused where impossible."""

from __future__ import annotations

from pathlib import Path

import pytest

import quantc
from quantc import api
from quantc.errors import UsageError
from quantc.passes.allocate import CANDIDATE_BITS
from quantc.plan import read_plan
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer
from tests.quantc.cli_runner import run as run_command

CALIBRATION = {"samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocate")
    (folder / "model").mkdir()
    save_with_tokenizer(build("llama"), folder / "model")
    return folder


def planned(saved: Path, average: float, **settings: object) -> api.Run:
    text = str(saved / "model/text.txt")
    return api.plan(saved / "model", avg_bits=average, group_size=16, calib=text, **CALIBRATION, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("average", [3.6, 4.0, 5.25, 8.9])
def test_an_average_is_kept_and_used_up(saved: Path, average: float) -> None:
    run = planned(saved, average)
    linears = run.graph.linears
    weights = sum(linear.weights for linear in linears.values())
    taken = sum(spec.stored_bits(linears[name].shape) for name, spec in run.plan.specs.items() if spec) / weights
    assert average - 0.25 < taken <= average
    assert {spec.bits for spec in run.plan.specs.values() if spec} <= set(CANDIDATE_BITS)
    assert any("predicted KL divergence" in note for note in run.report.notes)
    assert all("KL divergence" in why for why in run.plan.why.values())


def test_more_bits_are_predicted_to_lose_less(saved: Path) -> None:
    losses = [float(planned(saved, average).report.notes[-1].split()[-1]) for average in (3.6, 4.5, 6.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_build_has_the_size_that_was_asked_for(saved: Path) -> None:
    report = quantize_saved(saved, bits=4.5, group_size=16, preset="balanced", force=True)
    stored = report.summary()["bits_per_weight"]
    assert 4.25 < stored <= 4.5
    assert quantc.load(saved / "packed") is not None


def test_a_plan_from_the_command_line_is_built_as_it_stands(saved: Path) -> None:
    plan = saved / "plan.yaml"
    model, text = str(saved / "model"), str(saved / "model/text.txt")
    words = ["--calib", text, "--samples", "4", "--seq-len", "32"]
    result = run_command("plan", model, "--avg-bits", "4.5", "--group-size", "16", "-o", str(plan), *words)
    assert result.exit_code == 0, result.stderr
    assert "--calib" in result.stdout.partition("Next")[2]
    again = run_command("plan", model, "--avg-bits", "4.5", "--group-size", "16", "-o", str(plan), *words)
    assert again.exit_code == 2
    assert "pass --force to replace it" in again.stderr
    specs = read_plan(plan).specs
    assert len({spec.bits for spec in specs.values() if spec}) > 1
    quantize_saved(saved, plan=plan, force=True)
    built = api.CheckpointReader(saved / "packed").entries
    assert {name: entry.spec for name, entry in built.items()} == specs


def test_what_cannot_be_met_is_refused_with_what_can(saved: Path) -> None:
    with pytest.raises(
        UsageError, match=r"an average of 2\.5 bits cannot be met: the smallest plan takes 3\.\d+ .*; ask for 3\."
    ):
        planned(saved, 2.5)
    with pytest.raises(UsageError, match="there is no calibration text; pass --bits, or a text"):
        quantc.quantize(saved / "model", avg_bits=4.0, calib="none", out=saved / "none")
    with pytest.raises(UsageError, match="leave one of them out"):
        quantc.quantize(saved / "model", bits=3.5, avg_bits=4.0, out=saved / "none")
    assert not (saved / "none").exists()
    result = run_command("plan", str(saved / "model"), "--avg-bits", "4", "-o", str(saved / "nowhere/plan.yaml"))
    assert result.exit_code == 2
    assert "the folder" in result.stderr
