"""Formats by their labels: one alone for every layer, or several of any grid within a budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quantc import api
from quantc.checkpoint.reader import CheckpointReader
from quantc.driver.job import Job
from quantc.driver.settings import default_name
from quantc.errors import UsageError
from quantc.plan import Plan
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run as run_command

TRAINED = Path(__file__).parent.parent / "tiny_model" / "model"
CALIBRATION = {"samples": 4, "seq_len": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    save_with_tokenizer(build("llama"), folder)
    return folder


def planned(saved: Path, average: float, preset: str = "fast", **settings: Any) -> api.Run:
    text = str(saved / "text.txt")
    return api.plan(saved, avg_bits=average, calib=text, preset=preset, head_bits="keep", **CALIBRATION, **settings)


def quantized(saved: Path, out: Path, *words: str) -> Any:
    text = str(saved / "text.txt")
    return run_command(
        "quantize",
        str(saved),
        "-o",
        str(out),
        "--preset",
        "fast",
        "--calib",
        text,
        "--samples",
        "4",
        "--seq-len",
        "32",
        *words,
    )


@pytest.mark.parametrize(("label", "spec"), [("mxfp4", "mxfp4"), ("nf4", "nf4-g64"), ("w3g16sym", "w3g16sym")])
def test_one_format_is_that_of_every_layer(saved: Path, tmp_path: Path, label: str, spec: str) -> None:
    result = quantized(saved, tmp_path / "out", "--formats", label)
    assert result.exit_code == 0, result.output
    entries = CheckpointReader(tmp_path / "out").entries
    assert {entry.spec.label() for entry in entries.values()} == {spec}
    assert not any("embed" in name for name in entries)


def test_layers_that_blocks_do_not_divide_stay_floats(tmp_path: Path) -> None:
    words = ("--samples", "4", "--seq-len", "32", "--formats", "mxfp4", "-o", str(tmp_path / "out"))
    result = run_command("quantize", str(TRAINED), *words)
    assert result.exit_code == 0, result.output
    assert "4 layers kept as floats, whose rows blocks of 32 do not divide" in " ".join(result.output.split())
    assert len(CheckpointReader(tmp_path / "out").entries) == 24


def test_pinned_layers_may_stay_floats(saved: Path, tmp_path: Path) -> None:
    result = quantized(saved, tmp_path / "out", "--formats", "nvfp4", "--pin", "*.down_proj=16")
    assert result.exit_code == 0, result.output
    assert not any("down_proj" in name for name in CheckpointReader(tmp_path / "out").entries)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "mxfp5"], "no layer can be stored as mxfp5; pass --formats w4g128, nf4-g64, mxfp4 or another"),
        (["--formats", "iq4_xs"], "no layer can be stored as iq4_xs, whose blocks of 256 divide no row of this model"),
        (["--formats", "mxfp4,nf4"], "nothing says how small the model is to be"),
        (["--formats", "nf4", "--bits", "3"], "would be stored as w3.*, but only nf4-g64 may be used"),
        (["--formats", "w4g64", "--group-size", "16"], "would be stored as w4g16, but only w4g64 may be used"),
        (["--formats", "nf4", "--pin", "*=8"], "but only nf4-g64 may be used"),
    ],
)
def test_formats_that_contradict_other_options_are_refused(
    saved: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    result = quantized(saved, tmp_path / "out", *words)
    assert result.exit_code != 0
    assert re.search(message, result.output.replace("\n", " ")), result.output


def test_a_budget_rates_codes_that_are_asked_for(saved: Path) -> None:
    formats = ("nf4", "mxfp4", "nvfp4", "fp8", "w3g32")
    run = planned(saved, 5.0, formats=formats)
    chosen = {spec.label() for spec in run.plan.specs.values() if spec}
    assert chosen <= {"nf4-g64", "mxfp4", "nvfp4", "fp8-grow", "w3g32"}
    assert len(chosen) > 1
    taken = sum(spec.stored_bits(run.graph.linears[name].shape) for name, spec in run.plan.specs.items() if spec)
    assert 4.5 < taken / sum(linear.weights for linear in run.graph.linears.values()) <= 5.0
    with pytest.raises(UsageError, match="no layer can be stored as nf5"):
        planned(saved, 5.0, formats=("nf4", "nf5"))


def test_rotated_inputs_keep_their_rotation(saved: Path) -> None:
    run = planned(saved, 5.0, formats=("nf4",), preset="balanced")
    assert any(spec.hadamard for spec in run.plan.specs.values() if spec)
    assert {spec.code for spec in run.plan.specs.values() if spec} == {"nf4"}


def test_the_default_name_says_the_format(saved: Path) -> None:
    passes = Job.of({"formats": ["mxfp4"]}, None, "cpu", None).passes
    assert default_name("tiny", passes, Plan()) == "tiny-quantc-mxfp4"
