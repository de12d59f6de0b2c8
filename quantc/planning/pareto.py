"""Quality against size: plans of many sizes from one measurement of losses, and what building some of them showed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..graph.model_graph import Linear
from ..pipeline.run import Run
from ..plan import Plan
from ..spec import QuantSpec
from ..units import number, size
from .budget import KEPT_BITS, Budget, Shared
from .sizes import weights_bytes

if TYPE_CHECKING:
    from ..evaluation.scores import Scores

POINTS = 16
READABLE = (1, 0.5, 0.25, 0.1, 0.05, 0.01)  # steps of averages, the most readable first
NEGLIGIBLE = 1e-4  # nats per token, some 0.01 % of perplexity: nobody chooses among plans that lose less


@dataclass(frozen=True)
class Measured:
    """What a built point showed on the evaluation text. kl: mean over positions, in nats per token."""

    kl: float
    perplexity: float
    perplexity_original: float
    weights_bytes: int


@dataclass(frozen=True)
class Point:
    """A plan of the curve.

    option: what to pass to `quantc quantize` to build it. bits_per_weight: of the linears inside the blocks, all that
    is stored counted. weights_bytes: of all weight files. predicted_kl: in nats per token. widths: bits -> share of the
    weights of these linears; 16 are linears kept as they are, 0 are weights that are dropped. measured: None for a
    point that was not built.
    """

    option: str
    bits_per_weight: float
    weights_bytes: int
    predicted_kl: float
    widths: dict[int, float]
    plan: Plan
    measured: Measured | None = None

    def verified(self, scores: Scores, weights_bytes: int) -> Point:
        """Return the point with what its build showed beside the original."""
        assert scores.mean_kl is not None
        assert scores.perplexity_original is not None
        found = Measured(scores.mean_kl, scores.perplexity, scores.perplexity_original, weights_bytes)
        return replace(self, measured=found)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the plan."""
        return {name: value for name, value in asdict(self).items() if name != "plan"}


@dataclass
class Curve:
    """points: by rising size and falling loss. uniform: the same width everywhere, to compare with.

    text: what the measured points were measured on. files: that were written.
    """

    model: str
    points: list[Point]
    uniform: list[Point]
    text: str | None = None
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verified(self) -> list[Point]:
        """The points that were built."""
        return [point for point in self.points if point.measured is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return what `quantc pareto --json` prints."""
        points = {name: [point.to_dict() for point in getattr(self, name)] for name in ("points", "uniform")}
        return {"model": self.model, **points, "text": self.text, "files": self.files, "notes": self.notes}


def trace_curve(run: Run, budget: Budget) -> Curve:
    """Return the predicted points of a run whose linears have their specs at some width, and uniform ones to compare.

    A point of as many bits as a uniform one, or more, is predicted to lose no more. That does not hold for bytes of
    files: headers have names and shapes of as many tensors as a plan needs.
    """
    run.progress.stage("Curve", POINTS)

    def point(average: float) -> Point:
        found = _point(run, f"--avg-bits {average:g}", budget.share_average(average))
        run.progress.step(f"{average:g} bits")
        return found

    points = spread(point, _hundredths_above(budget.least, budget), _hundredths_above(budget.quantized().most, budget))
    run.progress.done()
    uniform = [_point(run, f"--bits {bits}", plan) for bits, plan in budget.uniform.items()]
    return Curve(run.report.model, points, uniform, notes=list(run.report.notes))


def spread(point: Callable[[float], Point], low: float, high: float) -> list[Point]:
    """Return about POINTS points for averages from low to high, without those that lose no less than a smaller one.

    A falling curve stays inside the box between two neighbours, as wide as their bits differ and as high as the
    logarithms of their losses: the next point divides the largest box, so that they are dense where the curve is steep.
    """
    found = {average: point(average) for average in (low, high)}
    while len(found) < POINTS:
        averages = sorted(found)
        boxes = [
            ((right - left) * (_height(found[left]) - _height(found[right])), middle)
            for left, right in pairwise(averages)
            if (middle := readable_between(left, right)) is not None
        ]
        area, middle = max(boxes, default=(0.0, low))
        if area <= 0:
            break
        found[middle] = point(middle)
    return _improving(found[average] for average in sorted(found))


def readable_between(low: float, high: float) -> float | None:
    """Return the roundest number in the middle half of an interval, None where two decimals find none."""
    middle = (low + high) / 2
    for step in READABLE:
        near = round(round(middle / step) * step, 2)
        if abs(near - middle) <= (high - low) / 4:
            return near
    return None


def spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` of `count` places, the middles of equal parts; all where more are wanted."""
    wanted = min(count, wanted)
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


def explained(curve: Curve) -> str:
    """Return a sentence or two on what the figures of a curve are."""
    text = "Quality against size: losses predicted from one measurement, widths chosen for every size."
    built = next((point.measured for point in curve.verified), None)
    if built is None:
        return text
    original = number(built.perplexity_original, 4)
    return f"{text} Measured on {curve.text} after building, where the original has perplexity {original}."


def table(points: list[Point]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows for a person to read, with measurements only where there are some."""
    measured = any(point.measured for point in points)
    heads = ["to build it", "bits/weight", "weights", "predicted KL"]
    heads += ["measured KL", "perplexity"] if measured else []
    return [*heads, "share of weights by bits"], [_row(point, measured) for point in points]


def _row(point: Point, measured: bool) -> list[str]:
    built = point.measured
    figures = ["", ""] if built is None else [number(built.kl), number(built.perplexity, 4)]
    widths = ", ".join(f"{bits}: {_percent(share)} %" for bits, share in point.widths.items())
    first = [point.option, f"{point.bits_per_weight:.3f}", size(point.weights_bytes), number(point.predicted_kl)]
    return [*first, *(figures if measured else []), widths]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.005 else "<1"


def _point(run: Run, option: str, shared: Shared) -> Point:
    specs = {**run.plan.specs, **shared.specs}
    weights = {name: run.graph.linears[name].weights for name in shared.specs}
    return Point(
        option=option,
        bits_per_weight=shared.bits / sum(weights.values()),
        weights_bytes=weights_bytes(run, specs),
        predicted_kl=shared.loss,
        widths=_widths(shared.specs, run.graph.linears),
        plan=Plan(specs, salience=run.plan.salience),
    )


def _widths(specs: Mapping[str, QuantSpec | None], linears: Mapping[str, Linear]) -> dict[int, float]:
    found: dict[int, float] = {}
    for name, spec in specs.items():
        shares = {KEPT_BITS: 1.0} if spec is None else spec.code_widths(linears[name].shape[0])
        for bits, share in shares.items():
            found[bits] = found.get(bits, 0) + linears[name].weights * share
    return {bits: found[bits] / sum(found.values()) for bits in sorted(found)}


def _hundredths_above(bits: int, budget: Budget) -> float:
    return -(-bits * 100 // budget.weights) / 100


def _height(point: Point) -> float:
    return log(max(point.predicted_kl, NEGLIGIBLE))


def _improving(points: Iterable[Point]) -> list[Point]:
    kept: list[Point] = []
    for point in points:
        if not kept or point.predicted_kl < kept[-1].predicted_kl:
            kept.append(point)
    return kept
