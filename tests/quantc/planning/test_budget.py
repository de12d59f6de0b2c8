"""Budgets without a model: a plan is never predicted to lose more than a uniform one of as many bits."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from quantc.graph.model_graph import Linear
from quantc.numerics import allocation
from quantc.planning.budget import Budget, Rules
from quantc.sensitivity import Candidate, Losses
from quantc.spec import QuantSpec

WIDTHS = (2, 3, 4, 5, 6, 8)
SHAPES = [(64, 64), (32, 64), (104, 64), (64, 104), (48, 96)]


def drawn(seed: int, pins: dict[str, int] | None = None) -> Budget:
    """Ten linears whose losses fall by about 4 for every bit; in odd seeds nearly alike, so that uniform is best."""
    draw, alike = random.Random(seed), seed % 2
    shapes = SHAPES[:1] if alike else SHAPES
    linears = {f"{at}": Linear(f"{at}", "linear", shapes[at % len(shapes)], "x") for at in range(10)}
    losses = {}
    for name in linears:
        scale = 1 + draw.uniform(0, 1e-15) if alike else 10 ** draw.uniform(-6, 0)
        specs = [QuantSpec(bits, 16, grouping) for bits in WIDTHS for grouping in ("per_oc", "per_ic")]  # type: ignore[arg-type]
        off = [1.0 if alike else draw.uniform(0.7, 1.4) for _ in specs]
        losses[name] = [Candidate(spec, scale * 4.0**-spec.bits * by) for spec, by in zip(specs, off, strict=True)]
    graph: Any = SimpleNamespace(linears=linears, blocks=[])
    kept = {name: 16 * linear.weights for name, linear in linears.items()}
    uniform = {bits: dict.fromkeys(linears, QuantSpec(bits, 16)) for bits in WIDTHS}
    return Budget(graph, Losses(losses), kept, Rules(pins or {}), uniform=uniform)


@pytest.mark.parametrize("states", [1, 2, 8, allocation.MOST_STATES])
@pytest.mark.parametrize("pins", [{}, {"3": 8, "5": 16}])
def test_at_the_bits_of_a_uniform_plan_no_more_is_lost(
    pins: dict[str, int], states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States: plans that the solver looks at together; where there are more, it may miss the best one."""
    monkeypatch.setattr(allocation, "MOST_STATES", states)
    for seed in range(10):
        budget = drawn(seed, pins)
        assert set(budget.uniform) == set(WIDTHS)
        for uniform in budget.uniform.values():
            for more in (0, 1, 999):
                shared = budget.share(uniform.bits + more)
                assert shared.bits <= uniform.bits + more
                assert shared.loss <= uniform.loss
            smallest = budget.smallest(uniform.loss)
            assert smallest.loss <= uniform.loss
            assert smallest.bits <= uniform.bits


def test_what_no_candidate_has_is_no_uniform_plan() -> None:
    assert set(drawn(0, {"3": 8}).uniform) == set(WIDTHS)
    graph: Any = SimpleNamespace(linears={"a": Linear("a", "linear", (8, 8), "x")}, blocks=[])
    losses = Losses({"a": [Candidate(QuantSpec(4, 8), 0.1)]})
    widths = {bits: {"a": QuantSpec(bits, 8)} for bits in (3, 4)}
    assert set(Budget(graph, losses, {"a": 1024}, Rules({}), uniform=widths).uniform) == {4}


def test_what_a_reader_loses_counts_for_weights_that_stay_as_they_are() -> None:
    """Kept, a linear may lose more than in a wider type, and then it is only kept where that does not fit."""
    graph: Any = SimpleNamespace(linears={"a": Linear("a", "linear", (8, 8), "x")}, blocks=[])
    wide = QuantSpec(8, 8)
    lost = {None: 0.5, wide: 0.2}
    budget = Budget(
        graph, Losses({"a": [Candidate(wide, 0.1)]}), {"a": 256}, Rules({}), besides=lambda _, spec: lost[spec]
    )
    larger, smaller = budget.share(1024), budget.share(256)
    assert (larger.specs, larger.losses) == ({"a": wide}, {"a": pytest.approx(0.3)})
    assert budget.besides(larger) == 0.2
    assert (smaller.specs, smaller.loss, budget.besides(smaller)) == ({"a": None}, 0.5, 0.5)
