"""Trellis codes or the grid: linears planned in the former are tried in both, and have what loses less."""

from __future__ import annotations

from dataclasses import replace

from ..graph.model_graph import Activation, Linear
from ..numerics.basis import Rounding
from ..numerics.sampled_error import guides, lost_energy
from ..numerics.statistics import Gram
from ..spec import QuantSpec
from .work import BlockWork

SAMPLED_ROWS = 64  # output channels of each linear, at least
TRIED_EXPERTS = 8  # of a stack, at most


def choose_codes(work: BlockWork, item: Activation, grams: list[Gram], rounding: Rounding) -> None:
    """Put the specs of the readers of an activation into the plan, where it leaves a choice.

    Both are rounded as the recipe does it, under the rotation that is planned, refinement aside. Of experts some are
    tried that saw enough rows; where none has, weights count alike.
    """
    plan = work.run.plan
    readers = [linear for linear in work.readers(item) if plan.specs[linear.name] and linear.name in plan.instead]
    if not readers:
        return
    seen = [expert for expert, gram in enumerate(grams) if guides(gram)]
    tried = seen[:: -(-len(seen) // TRIED_EXPERTS) or 1] or [0]
    each = {linear.name: _ways(work, linear) for linear in readers}
    lost = {name: dict.fromkeys(ways, 0.0) for name, ways in each.items()}
    for expert in tried:
        matrix, rows = (grams[expert].matrix, grams[expert].rows) if seen else (None, 0)
        bases = rounding.bases(matrix, rows, [spec for ways in each.values() for spec in ways.values()])
        for linear in readers:
            weight = work.weight(linear, expert)
            for way, spec in each[linear.name].items():
                lost[linear.name][way] += lost_energy(weight, bases[spec.hadamard], spec, SAMPLED_ROWS)
    for linear in readers:
        _settle(work, linear.name, each[linear.name], lost[linear.name])


def _ways(work: BlockWork, linear: Linear) -> dict[str, QuantSpec]:
    plan = work.run.plan
    planned = plan.specs[linear.name]
    assert planned is not None
    grid = replace(plan.instead[linear.name], hadamard=planned.hadamard, rank=planned.rank)
    return {"trellis": planned, "grid": grid}


def _settle(work: BlockWork, name: str, ways: dict[str, QuantSpec], lost: dict[str, float]) -> None:
    plan = work.run.plan
    chosen = "grid" if lost["grid"] < lost["trellis"] else "trellis"
    plan.specs[name] = ways[chosen]
    ratio = lost["trellis"] / lost["grid"] if lost["grid"] else 1.0
    plan.remark(name, f"{chosen}: trellis codes lose {ratio:.2g} times what {ways['grid'].label()} loses")
