"""docs/add-a-grid.md is run as it stands: its grid, its tests, and a model quantized with it, trained and loaded."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import quantc
from quantc.errors import UsageError
from quantc.kernels.registry import choose
from quantc.numerics.basis import Rounding
from quantc.numerics.grids.base import ARITHMETIC
from quantc.plan import Plan
from quantc.recipe import Recipe
from quantc.spec import GRIDS, QuantSpec

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "tests" / "tiny_model" / "model"
MODULES = ("quantc.spec.grids.log2", "quantc.numerics.grids.log2", "tests.quantc.numerics.test_log2")
CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add-a-grid.md").read_text(), re.DOTALL)


def run_page(name: str, code: str) -> ModuleType:
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(code, name, "exec"), vars(module))
    return module


@pytest.fixture
def page() -> Iterator[list[ModuleType]]:
    """The page's modules, its grid known as long as the test takes."""
    try:
        yield [run_page(name, code) for name, code in zip(MODULES, CODE, strict=True)]
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        GRIDS.pop("log2", None)
        ARITHMETIC.pop("log2", None)


def test_the_tests_of_the_page_pass(page: list[ModuleType]) -> None:
    tests = [value for name, value in vars(page[-1]).items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_spec_is_what_the_page_says(page: list[ModuleType]) -> None:
    spec = QuantSpec(4, 32, code="log2")
    assert spec.label() == "w4g32-log2"
    assert spec.to_dict()["code"] == "log2"
    choice = choose(spec, (16, 64), torch.device("cpu"), torch.float32)
    assert choice.kernel.name == "reference"
    assert choice.refused["native"] == "multiplies uniform codes, not log2 ones"


def test_weights_of_several_grids_share_a_sweep(page: list[ModuleType]) -> None:
    weight, gram = page[-1].problem()
    specs = [QuantSpec(4, 16), QuantSpec(4, 16, code="log2"), QuantSpec(3, 8, code="log2")]
    basis = Rounding().basis(gram, 400, 0, 3)
    for spec, found in zip(specs, basis.round_each(weight, specs), strict=True):
        alone = basis.round(weight, spec)
        # Matrix products of other shapes may add up in another order.
        assert (found.codes != alone.codes).float().mean() < 0.01
        assert torch.equal(found.scales, alone.scales)


def test_a_setting_the_grid_does_not_have_is_refused(page: list[ModuleType]) -> None:
    with pytest.raises(UsageError, match="bits is 5, but codes of log2 have 3 or 4 bits; choose one of those"):
        QuantSpec(5, code="log2")
    with pytest.raises(UsageError, match="5 rows have one bit more, which needs per_oc groups and fewer than 4 bits"):
        QuantSpec(4, code="log2", wide_rows=5)


def test_a_model_is_quantized_trained_and_loaded(page: list[ModuleType], tmp_path: Path) -> None:
    weights = load_file(MODEL / "model.safetensors")
    names = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    specs = {name: QuantSpec(4, 32, code="log2") if ".0." in name else QuantSpec(4, 32) for name in names}
    (tmp_path / "plan.yaml").write_text(Plan(dict(specs)).to_yaml())
    passes = [{"quantize": {"rounds": 1}}, {"tune": {"steps": 2}}, {"distill": {"steps": 1}}]
    recipe = Recipe.from_dict({"version": 1, "calibration": {"samples": 4, "seq_len": 32}, "passes": passes})
    out = tmp_path / "packed"
    report = quantc.quantize(MODEL, plan=tmp_path / "plan.yaml", recipe=recipe, out=out)
    assert {linear.spec.code for linear in report.linears} == {"log2", "uniform"}
    assert all(linear.error < 0.2 for linear in report.linears)
    model = quantc.load(out, verify=True)
    tokens = torch.arange(3, 20)[None]
    assert bool(model(tokens).logits.isfinite().all())
