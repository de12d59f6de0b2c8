"""Candidates whose most salient rows have one bit more: their losses follow from those of both widths, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from .base import Candidate, Losses

EIGHTHS = range(1, 8)  # of the rows, that have one bit more
ROW_STEP = 16  # rows that kernels multiply together


def with_wide_rows(losses: Losses) -> Losses:
    """Return losses with rows of two widths added where salience is known and both widths are dense candidates."""
    return Losses(
        {
            name: [*found, *_mixed(found, losses.salience[name])] if name in losses.salience else found
            for name, found in losses.items()
        },
        losses.salience,
        losses.inputs,
    )


def _mixed(candidates: list[Candidate], salience: torch.Tensor) -> Iterator[Candidate]:
    by_spec = {candidate.spec: candidate.loss for candidate in candidates}
    shares: dict[int, dict[int, float]] = {}
    for spec, loss in by_spec.items():
        if spec.sparse or not spec.groups.per_oc or spec.grid.wider() is None:
            continue
        wider = by_spec.get(replace(spec, bits=spec.bits + 1))
        if wider is None:
            continue
        step = max(ROW_STEP, spec.grid.rows_together(len(salience)))
        if step not in shares:
            shares[step] = _shares(salience, step)
        for rows, share in shares[step].items():
            yield Candidate(replace(spec, wide_rows=rows), (1 - share) * loss + share * wider)


def _shares(salience: torch.Tensor, step: int) -> dict[int, float]:
    """Return the share of a linear's loss that its most salient rows have, by how many they are, in steps."""
    n = len(salience)
    sums = salience.double().sort(descending=True).values.cumsum(0)
    counts = sorted({round(n * part / 8 / step) * step for part in EIGHTHS} - {0, n})
    return {rows: float(sums[rows - 1] / sums[-1]) for rows in counts if rows < n}
