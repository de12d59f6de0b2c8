"""Presets are recipes that run, print, and refuse what would harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import quantc
from quantc.errors import UsageError
from quantc.pipeline.base import check_order
from quantc.recipe import DEFAULT, PRESETS, Recipe, preset
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_recipe_that_can_be_printed_and_read_back(name: str) -> None:
    check_order(preset(name).build_passes())
    shown = run("recipe", "show", name)
    assert shown.exit_code == 0
    assert Recipe.from_dict(yaml.safe_load(shown.stdout)) == PRESETS[name]


def test_the_default_is_a_preset() -> None:
    assert preset("balanced") == DEFAULT


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="--preset 'bset' is unknown; choose .* .did you mean 'best'"):
        quantc.quantize("nowhere", bits=4, preset="bset")


def test_a_preset_and_a_recipe_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--preset is a recipe of its own; remove --preset or --recipe"):
        quantc.quantize("nowhere", bits=4, preset="best", recipe=DEFAULT)


@pytest.mark.parametrize("name", ["balanced", "best"])
def test_no_preset_rotates_before_plain_rounding(name: str, tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    report = quantc.quantize(
        tmp_path / "model", bits=4, preset=name, method="rtn", out=tmp_path / "out",
        calib=str(tmp_path / "model/text.txt"), samples=4, seq_len=32,
    )  # fmt: skip
    assert {(linear.method, linear.spec.hadamard) for linear in report.linears} == {("rtn", 0)}
    assert "rotate was left out: a rotated model loses by rounding to nearest" in report.notes
