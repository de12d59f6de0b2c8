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
    lost = {linear.name: {"trellis": 0.0, "grid": 0.0} for linear in readers}
    for expert in tried:
        gram = grams[expert] if seen else None
        for linear in readers:
            for way, spec in _ways(work, linear).items():
                matrix, rows = (None, 0) if gram is None else (gram.matrix, gram.rows)
                basis = rounding.bases(matrix, rows, [spec])[spec.hadamard]
                lost[linear.name][way] += lost_energy(work.weight(linear, expert), basis, spec, SAMPLED_ROWS)
    for linear in readers:
        _settle(work, linear, lost[linear.name])


def _ways(work: BlockWork, linear: Linear) -> dict[str, QuantSpec]:
    plan = work.run.plan
    planned = plan.specs[linear.name]
    assert planned is not None
    return {"trellis": planned, "grid": replace(plan.instead[linear.name], hadamard=planned.hadamard)}


def _settle(work: BlockWork, linear: Linear, lost: dict[str, float]) -> None:
    plan, ways = work.run.plan, _ways(work, linear)
    chosen = "grid" if lost["grid"] < lost["trellis"] else "trellis"
    plan.specs[linear.name] = ways[chosen]
    ratio = lost["trellis"] / lost["grid"] if lost["grid"] else 1.0
    plan.remark(linear.name, f"{chosen}: trellis codes lose {ratio:.2g} times what {ways['grid'].label()} loses")
