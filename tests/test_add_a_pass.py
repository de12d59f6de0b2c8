"""docs/add-a-pass.md: its passes and its tests run as they are printed there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import quantc
from quantc.errors import PassError
from quantc.pipeline.base import REGISTRY, check_order
from quantc.recipe import Recipe
from quantc.report import Report

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "tiny_model" / "model"
PAGE = (ROOT / "docs" / "add-a-pass.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"^`(\S+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
PASSES = [name for name in CODE if name.startswith("passes/")]
CALIBRATION = {"samples": 2, "seq_len": 64}


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The passes of the page, registered as if passes/__init__.py imported them."""
    for name in PASSES:
        module = ModuleType(f"quantc.passes.{Path(name).stem}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.__dict__["__package__"] = "quantc.passes"
        exec(compile(CODE[name], name, "exec"), module.__dict__)
    yield
    for name in PASSES:
        del REGISTRY[Path(name).stem]


def build(folder: Path, *passes: Any) -> Report:
    recipe = Recipe.from_dict({"version": 1, "calibration": CALIBRATION, "passes": list(passes)})
    return quantc.quantize(MODEL, recipe=recipe, out=folder / "packed")


def test_the_page_prints_three_passes_and_a_test() -> None:
    assert list(CODE) == ["passes/keep_ends.py", "passes/cast.py", "passes/census.py", "tests/passes/test_keep_ends.py"]


@pytest.mark.usefixtures("printed")
def test_the_printed_tests_pass(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__file__": str(ROOT / "tests" / "passes" / "test_keep_ends.py"), "__name__": "printed"}
    exec(compile(CODE["tests/passes/test_keep_ends.py"], "test_keep_ends.py", "exec"), names)
    names["test_the_ends_keep_their_floats"](tmp_path)
    names["test_it_needs_a_plan"]()
    names["test_a_negative_count_is_refused"]()


@pytest.mark.usefixtures("printed")
def test_the_printed_recipe_is_read() -> None:
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "keep_ends" in block)
    assert [name for name, _ in Recipe.from_dict(yaml.safe_load(text)).passes] == ["allocate", "keep_ends", "quantize"]


@pytest.mark.usefixtures("printed")
def test_cast_changes_the_weights_that_are_rounded(tmp_path: Path) -> None:
    allocate = {"allocate": {"bits": 8, "group_size": 32}}
    build(tmp_path, allocate, "cast", {"quantize": {"method": "rtn"}})
    build(tmp_path / "plain", allocate, {"quantize": {"method": "rtn"}})
    first, second = (quantc.load(folder / "packed") for folder in (tmp_path, tmp_path / "plain"))
    pair = [model.state_dict()["model.layers.0.mlp.up_proj.qweight"] for model in (first, second)]
    assert not torch.equal(*pair)
    with pytest.raises(PassError, match="needs the pass quantize"):
        check_order(Recipe.from_dict({"version": 1, "passes": ["allocate", "quantize", "cast"]}).build_passes())


@pytest.mark.usefixtures("printed")
def test_census_notes_what_it_counted(tmp_path: Path) -> None:
    notes = build(tmp_path, {"allocate": {"bits": 4, "group_size": 32}}, "quantize", "census").notes
    text, codes = (note for note in notes if note.startswith("census"))
    assert "tokens of 128" in text
    assert 0 < float(re.findall(r"([\d.]+)%", codes)[0]) < 100
