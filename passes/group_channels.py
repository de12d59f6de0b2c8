"""group_channels: chooses for every linear whether its groups run along the inputs (per_oc) or the outputs (per_ic).

In a per_oc group, inputs of one output channel share a scale: a channel with large weights takes the steps away from
its neighbours, and a channel with small weights under large activations is lost in theirs. A per_ic group is inside one
input channel, which then has scales of its own, but output channels share them. Which of the two loses less is
measured: both are rounded as the plan says (bits, rotation) and as the recipe will, on a sample of the groups along N.

Compared is the share of its energy that an output channel loses, averaged over channels, and not tr(D G D^T) with
D = W' - W, in which a few loud channels decide. Whoever reads the output can scale them back (down_proj those of
up_proj, say), and per_ic groups round the quiet channels beside them to nothing: on the outlier model of the tests
at 3 bits that raises the KL divergence from 0.18 to 1.27, and the mean share takes it to 0.013.

Source: AdaDim (Heo et al. 2023, arXiv:2309.15531), which compares tr(D G D^T).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..graph.model_graph import Activation, Linear
from ..numerics.basis import Basis, Rounding
from ..numerics.sampled_error import guides, lost_energies, sample_rows
from ..numerics.statistics import Gram, channel_energies
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run
from ..pipeline.work import BlockWork
from ..spec import Grouping, QuantSpec, Trellis

SAMPLED_ROWS = 256  # output channels, at least, on which both are tried: whole groups of them
# Share of the error that per_ic must save. Fewer kernels run it (torch's int4 operator does not), so that a tie goes to
# per_oc.
LEAST_GAIN = 0.02
GROUP_STEP = 8  # group sizes stay friendly to SIMD


@dataclass(frozen=True)
class GroupChannelsConfig:
    """error: what is compared, that of the outputs on the calibration rows, or that of the weights without them."""

    error: Literal["output", "weight"] = "output"


@register
class GroupChannels(Pass):
    """Sets the grouping of every planned linear; the plan says what was measured.

    A given plan is left as it is, and so is one chosen within a budget: that chose groupings too.
    """

    name = "group_channels"
    Config = GroupChannelsConfig
    needs = frozenset({Fact.PLANNED})
    breaks = frozenset({Fact.QUANTIZED})

    @property
    def calibrated(self) -> bool:
        return self.config.error == "output"

    def uncalibrated(self) -> Pass:
        return GroupChannels(replace(self.config, error="weight"))

    def plan(self, run: Run) -> None:
        if run.plan.given:
            run.report.notes.append("group_channels left the given plan as it is")

    def build(self, work: BlockWork) -> None:
        plan = work.run.plan
        if plan.given or plan.shared_out:
            return
        for item, grams in work.statistics():
            choices = [Choice(linear, spec) for linear in work.readers(item) if (spec := plan.specs[linear.name])]
            try:
                error = self._measure(work, item, choices, grams)
            except ArithmeticError:  # statistics that are not finite are for quantize to report
                continue
            for choice in choices:
                plan.specs[choice.linear.name], why = choice.decide(error)
                plan.remark(choice.linear.name, why)

    def _measure(self, work: BlockWork, item: Activation, choices: list[Choice], grams: list[Gram]) -> str:
        """Round every choice both ways, for all experts that saw enough rows; says which error was compared."""
        seen = [expert for expert, gram in enumerate(grams) if self.calibrated and guides(gram)]
        for expert in seen or range(work.experts(item)):
            gram, rows = (grams[expert].matrix, grams[expert].rows) if seen else (None, 0)
            open_choices = [choice for choice in choices if choice.other is not None]
            bases = work.rounding.bases(gram, rows, [choice.planned for choice in open_choices])
            for choice in open_choices:
                basis = bases[choice.planned.hadamard]
                choice.add(work.weight(choice.linear, expert), basis, work.rounding)
        return "output error" if seen else "weight error"


class Choice:
    """One linear, its spec with groups along either dimension, and what each of the two loses.

    Losses are shares of the energy of an output channel, summed over the channels that were tried.
    """

    def __init__(self, linear: Linear, planned: QuantSpec):
        self.linear, self.planned = linear, planned
        self.other = turn_groups(planned, linear.shape)
        self._specs = {spec.grouping: spec for spec in (planned, self.other) if spec is not None}
        self._lost = dict.fromkeys(self._specs, 0.0)
        self._channels = 0

    def add(self, weight: torch.Tensor, basis: Basis, rounding: Rounding) -> None:
        """Round a sample of one weight (N, K) both ways; there have to be two."""
        rows = sample_rows(len(weight), self._specs["per_ic"].group_length(self.linear.shape), SAMPLED_ROWS)
        sample = basis.turn(weight[rows.to(weight.device)])
        energies = channel_energies(sample, basis.gram)
        self._channels += len(rows)
        for grouping, spec in self._specs.items():
            lost = lost_energies(sample, basis, spec, rounding.rounds)
            shares = (lost / energies).clamp(max=1)  # more than lost it cannot be
            self._lost[grouping] += float(torch.where(energies > 0, shares, 0.0).sum())

    def decide(self, error: str) -> tuple[QuantSpec, str]:
        """Return the spec that loses less, and why; `error` says what was measured."""
        if self.other is None:
            if self.planned.sparse:
                return self.planned, "per_oc: weights are dropped along the inputs"
            missing = "per_oc" if self.planned.grouping == "per_ic" else "per_ic"
            return self.planned, f"{self.planned.grouping}: {missing} groups need more bits"
        per_ic, per_oc = (self._lost[grouping] / self._channels for grouping in ("per_ic", "per_oc"))
        chosen: Grouping = "per_ic" if per_ic < per_oc * (1 - LEAST_GAIN) else "per_oc"
        draw = f"; per_ic has to save {LEAST_GAIN:.0%}" if chosen == "per_oc" and per_ic < per_oc else ""
        return self._specs[chosen], f"{chosen}: {error} {per_ic:.3g} per_ic, {per_oc:.3g} per_oc{draw}"


def turn_groups(spec: QuantSpec, shape: tuple[int, int]) -> QuantSpec | None:
    """Return the spec with groups along the other dimension of a weight (N, K), at no more bits, or None.

    Groups keep their length where they can. Where the other dimension is no multiple of it, so that more groups would
    be needed, they are longer, by as little as saves the difference. Weights are dropped along K.
    """
    if spec.sparse or spec.code == Trellis.name:
        return None
    other = replace(spec, grouping="per_ic" if spec.grouping == "per_oc" else "per_oc")
    along = shape[0] if other.grouping == "per_ic" else shape[1]
    g = min(spec.group_length(shape), along)
    for size in (g, *range(g - g % GROUP_STEP + GROUP_STEP, along, GROUP_STEP), along):
        candidate = replace(other, group_size=size)
        if candidate.stored_bits(shape) <= spec.stored_bits(shape):
            return candidate
    return None
