"""The plots of KL divergence against bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .results import MODELS, find, load, uniform
from .trellis import FILE, mixed_grids

METHODS = {"rtn": "round to nearest", "plain-gptq": "GPTQ", "fast": "fast", "balanced": "balanced", "best": "best"}
COLOURS = {"rtn": "#9aa1a9", "plain-gptq": "#656b73", "fast": "#7fb0e0", "balanced": "#2f6fb3", "best": "#0b3d70"}
MIXED, OTHERS = "#c2410c", "#3f7d20"
LOOK: Any = {"svg.fonttype": "none", "svg.hashsalt": "quantc", "font.size": 9}


def save(file: Path) -> None:
    """Draw the plot of two models into an SVG file, the same bytes for the same results."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _draw(left, "SmolLM2-135M")
        _draw_others(left)
        _draw(right, "Gemma-3-270M")
        left.set_ylabel("KL divergence, nats per token")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def save_trellis(file: Path) -> None:
    """Draw grids and trellis codes of all models into an SVG file."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, len(MODELS), sharey=True)
        for axes, model in zip(panels, MODELS, strict=True):
            grids = [row for bits in (2, 3, 4) if (row := uniform(model, bits, "balanced"))]
            rows = [row for row in load(FILE) if row["model"] == model and row["method"] == "balanced"]
            whole = [row for row in rows if isinstance(row["bits"], int)]
            averages = [row for row in rows if isinstance(row["bits"], float)]
            for label, points, colour, style in (
                ("grids in groups of 64", grids, COLOURS["balanced"], "o-"),
                ("grids, mixed widths", mixed_grids(model), COLOURS["fast"], "s-"),
                ("trellis", whole, MIXED, "o-"),
                ("trellis, mixed widths", averages, MIXED, "s:"),
            ):
                each = sorted((row["bits_per_weight"], row["mean_kl"]) for row in points)
                axes.plot([x for x, _ in each], [y for _, y in each], style, color=colour, label=label, markersize=4)
            axes.set(yscale="log", title=model, xlabel="bits per weight, scales counted")
            axes.grid(alpha=0.3, which="both")
        panels[0].set_ylabel("KL divergence, nats per token")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


def _draw(axes: Any, model: str) -> None:
    for method, label in METHODS.items():
        rows = [row for bits in (2, 3, 4) if (row := uniform(model, bits, method)) and row["mean_kl"] < 3]
        x, y = [row["bits_per_weight"] for row in rows], [row["mean_kl"] for row in rows]
        axes.plot(x, y, "o-", color=COLOURS[method], label=label, markersize=4)
    mixed = sorted(
        (row["bits_per_weight"], row["mean_kl"])
        for row in load("budgets.json")
        if row["model"] == model and row["group_size"] is None
    )
    axes.plot(*zip(*mixed, strict=True), "s-", color=MIXED, label="balanced, mixed widths", markersize=4)
    axes.set(yscale="log", title=model, xlabel="bits per weight of the linears, scales and zero points counted")
    axes.grid(alpha=0.3, which="both")


def _draw_others(axes: Any) -> None:
    """llama.cpp's types and AutoRound, which were measured on SmolLM2-135M only."""
    rows = load("llama_cpp.json")["rows"]
    axes.plot(
        [row["bits_per_weight"] for row in rows], [row["mean_kl"] for row in rows], "^", color=OTHERS, label="llama.cpp"
    )
    for row in rows:
        axes.annotate(
            row["type"], (row["bits_per_weight"], row["mean_kl"]), (4, 4), textcoords="offset points", fontsize=7
        )
    bits = (uniform("SmolLM2-135M", 3, "plain-gptq") or {})["bits_per_weight"]
    learned = (find("autoround.json", tool="AutoRound, 50 steps") or {})["mean_kl"]
    axes.plot([bits], [learned], "D", color=OTHERS, fillstyle="none", label="AutoRound, 50 steps")
