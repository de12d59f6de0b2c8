"""scale: divides the channels of an activation where it is written, and multiplies them back in its readers.

Channels that carry much get finer steps, those that carry little get coarser ones. Per activation the exponent is
searched that leaves the least output error of all its readers together, rounded as the plan says (its bits, groups
and rotation) and as the recipe will, on a sample of output channels.

Source: AWQ (Lin et al. 2023, arXiv:2306.00978), which searches with plain rounding and mean magnitudes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..graph.model_graph import Activation, Linear
from ..graph.rewrite import Refusal
from ..numerics.sampled_error import lost_energy
from ..numerics.statistics import Gram
from ..pipeline.base import Fact, Pass, register
from ..pipeline.work import BlockWork

# Scales are the root mean square of a channel to these powers. At 1 every channel would carry the same: on
# SmolLM2-135M at 3 bits, rotated, that triples the KL divergence, while 0.5 takes 2 % off.
EXPONENTS = (0.25, 0.5, 0.75)
# Rounding to nearest is tried six times as fast as error feedback, and gains from the steps between.
FINE_EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SAMPLED_ROWS = 128  # output channels of each reader, at least, on which an exponent is tried
LARGEST_RATIO = 2.0**7  # of a scale to the mean one
LEAST_GAIN = 0.005  # share of the error that an exponent must save to be used
FOLDABLE = ("normed", "gated", "value")


@dataclass(frozen=True)
class ScaleConfig:
    """Nothing to set: exponents are searched for every activation."""


@register
class Scale(Pass):
    """Scales every activation that a diagonal folds into, where that saves output error."""

    name = "scale"
    Config = ScaleConfig
    needs = frozenset({Fact.PLANNED})

    @property
    def calibrated(self) -> bool:
        return True

    def build(self, work: BlockWork) -> None:
        for item, grams in work.statistics():
            readers = work.readers(item)
            if item.kind in FOLDABLE and len(grams) == 1 and all(linear.kind != "stack" for linear in readers):
                refused = self._scale(work, item, readers, grams[0])
                if refused:
                    work.run.report.refused[f"scale {item.label}"] = refused

    def search(self, work: BlockWork, item: Activation, readers: list[Linear], gram: Gram) -> torch.Tensor | None:
        """See `best_scales`."""
        return best_scales(work, item, readers, gram)

    def _scale(self, work: BlockWork, item: Activation, readers: list[Linear], gram: Gram) -> str:
        """Scale an activation; return why it cannot be, or "" when it was or is best left alone."""
        try:
            scales = self.search(work, item, readers, gram)
        except Refusal as refusal:
            return str(refusal)
        refused = "" if scales is None else work.divide(item, scales)
        if scales is not None and not refused:
            work.run.report.count_rewrite(self.name, item.kind)
        return refused


def best_scales(work: BlockWork, item: Activation, readers: list[Linear], gram: Gram) -> torch.Tensor | None:
    """Return scales (K,) of least error, or None where not scaling is as good.

    Only what can be folded exactly is tried: powers of two where a bias is divided, one scale for all query heads of
    a value channel. Raises Refusal where nothing can.
    """
    matrix = gram.matrix
    energy = matrix.diagonal().double()
    if not gram.rows or not 0 < float(energy.sum()) < math.inf:  # what overflowed is for quantize to report
        return None
    magnitude = (energy / energy[energy > 0].mean()).sqrt()
    exponents = EXPONENTS if work.rounding.feedback else FINE_EXPONENTS
    wanted = [magnitude.pow(exponent).clamp(1 / LARGEST_RATIO, LARGEST_RATIO) for exponent in exponents]
    usable = [work.usable_scales(item, scales) for scales in wanted]
    best, least = None, (1 - LEAST_GAIN) * _error(work, readers, matrix, gram.rows, torch.ones_like(magnitude))
    for scales in usable:
        error = _error(work, readers, matrix, gram.rows, scales)
        if error < least:
            best, least = scales, error
    return best


def _error(work: BlockWork, readers: list[Linear], gram: torch.Tensor, rows: int, scales: torch.Tensor) -> float:
    """Return the output error of the readers, rounded with these scales on a sample of their output channels."""
    inverse = (1 / scales).to(gram)
    divided = gram * inverse[:, None] * inverse
    specs = {linear: spec for linear in readers if (spec := work.run.plan.specs[linear.name])}
    bases = work.rounding.bases(divided, rows, specs.values())
    total = 0.0
    for linear, spec in specs.items():
        weight = work.weight(linear)
        total += lost_energy(weight * scales.to(weight), bases[spec.hadamard], spec, SAMPLED_ROWS)
    return total
