"""The plots of a comparison: divergence against size, and the error of each block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..evaluation.comparison import Comparison
from .plots import DIM, MIXED, UNIFORM, VERIFIED, as_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Seen on white and on black; the first two are the page's own.
COLOURS = (MIXED, VERIFIED, "#3f8f5f", "#8b5fbf", "#b7791f", UNIFORM)


def size_svg(comparison: Comparison) -> str:
    """Draw the KL divergence of each model against the size of its weight files as an <svg> element."""
    return as_svg(partial(_draw_sizes, comparison))


def block_svg(comparison: Comparison) -> str:
    """Draw the error of each block, a line for each model, as an <svg> element."""
    return as_svg(partial(_draw_blocks, comparison))


def _draw_sizes(comparison: Comparison) -> Figure:
    figure, axes = _axes()
    others = list(zip(comparison.labels, comparison.models, strict=True))[1:]
    unit, divisor = ("GB", 1e9) if max(model.weights_bytes for _, model in others) >= 2e9 else ("MB", 1e6)
    if all(model.mean_kl for _, model in others):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    for at, (label, model) in enumerate(others):
        point = (model.weights_bytes / divisor, model.mean_kl or 0.0)
        axes.plot(*point, "o", color=COLOURS[at % len(COLOURS)], markersize=7)
        axes.annotate(label, point, xytext=(8, 4), textcoords="offset points", color=DIM, parse_math=False)
    axes.margins(x=0.25, y=0.15)  # room for the labels
    axes.set_xlabel(f"weight files ({unit})")
    axes.set_ylabel("KL divergence (nats per token)")
    return figure


def _draw_blocks(comparison: Comparison) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes()
    for at, (label, model) in enumerate(list(zip(comparison.labels, comparison.models, strict=True))[1:]):
        if model.block_errors is not None:
            axes.plot(model.block_errors, "o-", color=COLOURS[at % len(COLOURS)], markersize=3, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel("relative error of its output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    return figure


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
