"""Plots, drawn by matplotlib, which is imported when a plot is drawn and may be missing."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planning.pareto import Curve, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Those of the HTML pages in their light colours; a page puts its own variables in their place.
INK, DIM, LINE = "#1c1e21", "#656b73", "#d9dde2"
MIXED, VERIFIED, UNIFORM = "#2f6fb3", "#c2410c", "#7a818a"
PNG_DPI = 160
# Without salt and date the same curve would be another SVG file every time.
LOOK: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "quantc", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": LINE, "grid.color": LINE, "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": DIM,
    "ytick.labelcolor": DIM,
}  # fmt: skip
SVG_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def available() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def pareto_png(curve: Curve) -> bytes:
    """Draw the curve as a PNG file on white."""

    def titled() -> Figure:
        figure = _draw(curve)
        figure.suptitle(curve.model, parse_math=False)  # a page has a title of its own
        return figure

    return _saved(titled, "png", dpi=PNG_DPI, facecolor="white", metadata={"Software": "quantc"})


def is_plot(file: Path) -> bool:
    """Return whether a file is a PNG that quantc drew."""
    with file.open("rb") as stream:
        return b"Software\0quantc" in stream.read(1000)


def pareto_svg(curve: Curve) -> str:
    """Draw the curve as an <svg> element without a background, its text as text."""
    return as_svg(partial(_draw, curve))


def as_svg(draw: Callable[[], Figure]) -> str:
    """Return a figure as an <svg> element without a background, its text as text."""
    text = _saved(draw, "svg", transparent=True, metadata=SVG_METADATA).decode()
    return text[text.index("<svg") :]


def _saved(draw: Callable[[], Figure], kind: str, **how: Any) -> bytes:
    import matplotlib

    with matplotlib.rc_context(LOOK):
        stream = io.BytesIO()
        draw().savefig(stream, format=kind, **how)
    return stream.getvalue()


def _draw(curve: Curve) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    axes.margins(x=0.08)  # room for the label of the last uniform width
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("bits per weight, scales and zero points counted")
    axes.set_ylabel("KL divergence to the original (nats per token)")
    _draw_points(axes, curve)
    _add_sizes(axes, curve)
    axes.legend(frameon=False)
    return figure


def _draw_points(axes: Axes, curve: Curve) -> None:
    mixed = [point for point in curve.points if point.predicted_kl > 0]
    uniform = [point for point in curve.uniform if point.predicted_kl > 0]
    axes.plot(*_places(mixed), "o-", color=MIXED, markersize=4, label="mixed widths, predicted")
    if uniform:
        axes.plot(*_places(uniform), "s", color=UNIFORM, fillstyle="none", label="uniform widths, predicted")
    for point in uniform:
        label = f"{point.option.split()[-1]} bits"
        at = (point.bits_per_weight, point.predicted_kl)
        axes.annotate(label, at, xytext=(7, 3), textcoords="offset points", color=DIM, fontsize=8)
    if curve.verified:
        bits = [point.bits_per_weight for point in curve.verified]
        kl = [point.measured.kl for point in curve.verified if point.measured]
        axes.plot(bits, kl, "D", color=VERIFIED, markersize=7, label="mixed widths, measured")


def _places(points: list[Point]) -> tuple[list[float], list[float]]:
    return [point.bits_per_weight for point in points], [point.predicted_kl for point in points]


def _add_sizes(axes: Axes, curve: Curve) -> None:
    """Add a second axis on top: the size of the weight files, which is linear in the bits."""
    first, last = curve.points[0], curve.points[-1]
    bits = last.bits_per_weight - first.bits_per_weight
    if bits <= 0:
        return
    unit, divisor = ("GB", 1e9) if last.weights_bytes >= 2e9 else ("MB", 1e6)
    slope = (last.weights_bytes - first.weights_bytes) / bits / divisor
    start = first.weights_bytes / divisor - slope * first.bits_per_weight

    def to_size(x: Any) -> Any:
        return start + slope * x

    def to_bits(y: Any) -> Any:
        return (y - start) / slope

    top = axes.secondary_xaxis("top", functions=(to_size, to_bits))
    top.set_xlabel(f"weight files ({unit})")
