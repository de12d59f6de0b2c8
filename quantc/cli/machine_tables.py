"""The answer of `quantc doctor` as rich tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..units import number, plural
from .pieces import dimensions, fact_table, heading, indented, table_of


def diagnosed(facts: dict[str, Any]) -> RenderableType:
    """Return the machine and its libraries; for a checkpoint the kernel of each linear and why; the kernels' speed."""
    parts: list[RenderableType] = [fact_table([(name, text, "") for name, text in facts["machine"].items()])]
    if "checkpoint" in facts:
        parts += _chosen_kernels(facts)
    if "measured" in facts:
        parts += _kernel_speed(facts["measured"])
    return Group(*parts)


def _chosen_kernels(facts: dict[str, Any]) -> list[RenderableType]:
    title = heading(f"Kernels for {facts['checkpoint']} in {facts['dtype']} on {facts['device']}")
    table = table_of(["linears", "spec", "shape", "kernel", "refused because"], numeric={"linears", "shape"})
    for group in facts["linears"]:
        reasons = "\n".join(f"{kernel} {reason}" for kernel, reason in group["refused"].items())
        shape = dimensions(group["shape"])
        table.add_row(str(group["count"]), group["label"], shape, group["kernel"], Text(reasons, style="dim"))
    return [title, table]


SPEED_COLUMNS = ("bits", "x", "kernel", "ns a weight in cache", "from memory", "GB/s", "x F.linear", "limited by")


def _kernel_speed(measured: dict[str, Any] | str) -> list[RenderableType]:
    if isinstance(measured, str):
        return [heading("Speed for one row"), indented(Text(measured))]
    threads, level = plural(measured["threads"], "thread"), measured["level"]
    bandwidth = number(measured["read_gb_per_s"])
    title = heading(f"Speed for one row on {threads} with {level}; memory is read at {bandwidth} GB/s")
    table = table_of(list(SPEED_COLUMNS), numeric={*SPEED_COLUMNS} - {"x", "kernel", "limited by"})
    for row in measured["rows"]:
        names = ("cached_ns_per_weight", "ns_per_weight", "gb_per_s", "times_float32_linear")
        figures = [number(row[name]) for name in names]
        table.add_row(str(row["bits"]), row["x"], row["kernel"], *figures, row["limit"])
    return [title, table]
