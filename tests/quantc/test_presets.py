"""Presets are recipes that run, print, and refuse what would harm."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import quantc
from quantc.errors import UsageError
from quantc.pipeline import check_order
from quantc.presets import PRESETS, preset
from quantc.recipe import DEFAULT, Recipe
from tests.quantc.cli_runner import run


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_recipe_that_can_be_printed_and_read_back(name: str) -> None:
    check_order(preset(name).build_passes())
    shown = run("recipe", "show", name)
    assert shown.exit_code == 0
    assert Recipe.from_dict(yaml.safe_load(shown.stdout)) == PRESETS[name]


def test_the_default_is_a_preset() -> None:
    assert preset("fast") == DEFAULT


def test_an_unknown_preset_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="there is no preset 'bset'; did you mean 'best'"):
        quantc.quantize("nowhere", bits=4, preset="bset")


def test_a_preset_and_a_recipe_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="a preset is a recipe, so both cannot be given"):
        quantc.quantize("nowhere", bits=4, preset="best", recipe=DEFAULT)


@pytest.mark.parametrize("name", ["balanced", "best"])
def test_no_preset_rotates_before_plain_rounding(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the preset {name} rotates, and a rotated model loses by plain rounding"):
        quantc.quantize("nowhere", bits=4, preset=name, method="rtn", out=tmp_path / "out")
