"""`--calib none`: nothing is read, no calibration pass runs, and the report says what was done instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import UsageError
from quantc.recipe import Recipe
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run
from tests.whole.test_families import TOKENS

ROUNDED = "without calibration text quantize has method rtn instead of gptq"
EVERYTHING = {
    "version": 1,
    "calibration": {"source": "none"},
    "passes": [
        {"allocate": {"bits": 4, "group_size": 16}},
        "importance",
        "scale",
        "rotate",
        "group_channels",
        {"compensate": {"rank": 2}},
        {"quantize": {"rounds": 1, "shrink": 0.1, "correct": 0.5}},
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a text, or running the model on one, fails the test."""

    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("calibration text is needed")

    for name in (
        "quantc.calibration.tokens.load_documents",
        "quantc.driver.job.calibration_tokens",
        "quantc.pipeline.sweep.CalibrationRun",
    ):
        monkeypatch.setattr(name, fail)


def left_out(name: str) -> str:
    return f"{name} was left out: it needs calibration text"


@pytest.mark.parametrize(
    ("preset", "before", "after"),
    [("fast", [], []), ("balanced", ["rotate"], []), ("best", ["scale", "rotate"], ["tune", "distill"])],
)
def test_every_preset_runs_and_the_report_names_what_it_could_not_do(
    preset: str, before: list[str], after: list[str], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = f"--bits 4 --group-size 16 --preset {preset} --calib none --out {out}"
    result = run("quantize", str(model), *words.split())
    assert result.exit_code == 0, result.stderr
    assert "calibration none" in " ".join(result.stdout.split())
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"] == "none"
    assert {linear["method"] for linear in report["linears"]} == {"rtn"}
    assert not any(linear["spec"]["hadamard"] for linear in report["linears"])
    assert report["notes"] == [*map(left_out, before), ROUNDED, *map(left_out, after)]
    manifest = json.loads((out / "quantc.json").read_text())
    assert manifest["recipe"]["calibration"]["source"] == "none"
    assert manifest["calibration_sha256"] is None


def test_weights_are_those_of_rounding_to_nearest(model: Path, tmp_path: Path) -> None:
    for name, settings in {"none": {"calib": "none"}, "rtn": {"method": "rtn"}}.items():
        quantc.quantize(model, bits=3, group_size=16, out=tmp_path / name, **settings)  # type: ignore[arg-type]
    none, rtn = (CheckpointReader(tmp_path / name) for name in ("none", "rtn"))
    assert none.weight_map.keys() == rtn.weight_map.keys()
    assert all(torch.equal(none.tensor(name), rtn.tensor(name)) for name in none.weight_map)


def test_a_recipe_with_every_pass_does_what_it_can(model: Path, tmp_path: Path) -> None:
    report = quantc.quantize(model, recipe=Recipe.from_dict(EVERYTHING), out=tmp_path / "out")
    assert report.notes == [
        *map(left_out, ["importance", "scale", "rotate"]),
        "without calibration text group_channels has error weight instead of output",
        ROUNDED,
    ]
    assert all("weight error" in linear.why or "need more bits" in linear.why for linear in report.linears)
    assert {linear.spec.rank for linear in report.linears} == {2}
    packed = quantc.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found, expected = (each(input_ids=TOKENS, use_cache=False).logits for each in (packed, build("llama")))
    assert (found - expected).norm() < 0.3 * expected.norm()


def test_a_method_that_needs_text_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(EVERYTHING))
    for words in ("--bits 4 --calib none", f"--recipe {file}"):
        result = run("quantize", str(model), "--method", "gptq", "--out", str(tmp_path / "out"), *words.split())
        assert result.exit_code == 2
        assert result.stderr == (
            "Error: --method gptq needs calibration text, and --calib is none; remove --method, or pass a text.\n"
        )
    assert not (tmp_path / "out").exists()


def test_a_misspelled_none_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(UsageError, match="did you mean 'none'"):
        quantc.quantize(model, bits=4, calib="nono", out=tmp_path / "out")
