"""The best plan within an average or a size, and what is said where even the smallest plan is too large."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from quantc.errors import UsageError
from quantc.graph.model_graph import Linear
from quantc.planning import limits
from quantc.planning.budget import Budget, Rules
from quantc.planning.limits import Average, Size
from quantc.planning.settings import AllocateConfig
from quantc.sensitivity import Candidate, Losses
from quantc.spec import QuantSpec

WIDTHS = (2, 3, 4, 5, 6, 8)
LINEARS = {f"{at}": Linear(f"{at}", "linear", (64, 64), "x") for at in range(10)}
SPECS = {bits: QuantSpec(bits, 16, symmetric=True) for bits in WIDTHS}


def file_bytes(_: object, specs: dict[str, QuantSpec]) -> int:
    """Every format makes the header longer."""
    return sum(spec.stored_bits((64, 64)) for spec in specs.values()) // 8 + 200 * len(set(specs.values()))


@pytest.fixture
def budget() -> Budget:
    losses = {
        name: [Candidate(spec, (5 if name == "0" else 1) * 4.0**-bits) for bits, spec in SPECS.items()]
        for name in LINEARS
    }
    graph: Any = SimpleNamespace(linears=LINEARS, blocks=[])
    uniform = {bits: dict.fromkeys(LINEARS, spec) for bits, spec in SPECS.items()}
    return Budget(graph, Losses(losses), dict.fromkeys(LINEARS, 1 << 16), Rules({}), uniform=uniform)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(limits, "output_bytes", file_bytes)
    return SimpleNamespace(plan=SimpleNamespace(specs={}))


def test_in_the_file_size_of_a_uniform_plan_no_more_is_lost(budget: Budget, run: Any) -> None:
    """Of as many bits a plan of three widths loses less, but its header is longer than those bits are worth."""
    four = budget.uniform[4]
    assert len(set(budget.share(four.bits).specs.values())) == 3
    for uniform in budget.uniform.values():
        allowed = file_bytes(None, uniform.specs)  # type: ignore[arg-type]
        size = Size(run, budget, AllocateConfig(), allowed)
        plan = size.plan()
        assert file_bytes(None, plan.specs) <= allowed  # type: ignore[arg-type]
        assert plan.loss <= uniform.loss
        assert size.fits(uniform)
        assert not Size(run, budget, AllocateConfig(), allowed - 1).fits(uniform)


@pytest.mark.parametrize(
    ("config", "also"),
    [
        (AllocateConfig(), ", or fewer for embedding and head (--head-bits auto)."),
        (AllocateConfig(head_bits="keep"), ", or quantize the embedding and the head too (--head-bits auto)."),
        (AllocateConfig(head_bits="auto"), " bytes or more."),
    ],
)
def test_the_size_that_is_named_instead_of_one_too_small_is_enough(
    config: AllocateConfig, also: str, budget: Budget, run: Any
) -> None:
    with pytest.raises(UsageError, match=r"^a size of 1\.00 kB cannot be met: ") as refused:
        Size(run, budget, config, 1000).plan()
    assert str(refused.value).endswith(also)
    needed = int(re.findall(r"ask for (\d+) bytes", str(refused.value))[0])
    assert file_bytes(None, Size(run, budget, config, needed).plan().specs) == needed  # type: ignore[arg-type]


def test_the_average_that_is_named_instead_of_one_too_small_is_enough(budget: Budget) -> None:
    config = AllocateConfig(pins={"0": 2})
    with pytest.raises(UsageError, match=r"^an average of 0\.5 bits .* within the pins and formats given") as refused:
        Average(budget, config, 0.5).plan()
    enough = float(re.findall(r"ask for ([\d.]+) or more", str(refused.value))[0])
    average = Average(budget, config, enough)
    assert average.fits(average.plan())
    assert not Average(budget, config, enough - 0.01).fits(average.plan())
