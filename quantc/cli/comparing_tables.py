"""The answers of `quantc compare` and `quantc check` as rich tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from ..errors import as_option, printable
from ..units import number, plural
from .pieces import fact_table, heading, indented, section, table_of

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison


def compared(result: Comparison) -> RenderableType:
    """Return a line for each model, the errors by block, and what to know of the figures."""
    from ..evaluation.comparison import WORDS

    def table(heads: list[str], rows: list[list[str]]) -> RenderableType:
        shown = table_of(heads, numeric=set(heads) - WORDS)
        for row in rows:
            shown.add_row(*row)
        return shown

    parts: list[RenderableType] = [table(*result.table()), Text(), Text(result.explained(), style="dim")]
    if result.has_block_errors:
        parts += [heading("Relative error of each block's output"), table(*result.block_table())]
    parts += section("Notes", [Text(printable(note)) for note in result.notes])
    if result.page is not None:
        parts += [Text(), Text.assemble(("Wrote ", "bold green"), (printable(str(result.page)), "bold"))]
    return Group(*parts)


def checked(verdict: dict[str, Any]) -> RenderableType:
    """Return whether each limit holds, and what loses most where one does not."""
    passed, scores = verdict["passed"], verdict["scores"]
    word = ("PASSED", "bold green") if passed else ("FAILED", "bold red")
    read = f"{scores['positions']:,} predictions in {plural(scores['windows'], 'window')}"
    facts = [_limit(held) for held in verdict["limits"]]
    facts += [("computed in", verdict["dtype"], verdict["dtype_reason"]), ("text", read, "")]
    parts: list[RenderableType] = [
        Text.assemble(word, f" {verdict['model']} against {verdict['against']}"),
        fact_table(facts),
    ]
    notes, blame = list(verdict["notes"]), verdict["blame"]
    if blame is not None:
        parts += _restored("Blocks that lose most", blame["blocks"])
        parts += _restored("Layers in them that lose most", blame["linears"])
        notes += blame["notes"]
        if blame["blocks"]:
            notes.append(
                f"the original's weights were put back in {blame['evaluations']} ways, each measured on "
                f"{blame['predictions']:,} predictions; alone is the KL divergence with all else restored"
            )
            notes.append("to quantize again with more bits for some layers, pass --pin NAME=8 for each")
    return Group(*parts, *section("Notes", [Text(note) for note in notes]))


def _limit(held: dict[str, Any]) -> tuple[str, str, str]:
    share = held["name"] == "max_ppl_increase"
    measured, limit = held["measured"], held["limit"]
    found, allowed = (f"{number(100 * measured)} %", f"{100 * limit:g}%") if share else (number(measured), f"{limit:g}")
    name = "perplexity increase" if share else "KL divergence"
    return name, found, f"{'within' if held['holds'] else 'exceeds'} {as_option(held['name'])} {allowed}"


def _restored(title: str, rows: list[dict[str, Any]]) -> list[RenderableType]:
    """Return a line for each part: restoring it, after those before it, takes the divergence from here to there."""
    if not rows:
        return []
    table = table_of(["restored", "KL from", "to", "alone"], numeric={"KL from", "to", "alone"})
    for row in rows:
        table.add_row(row["name"], number(row["before"]), number(row["after"]), number(row["alone"]))
    return [heading(title), indented(table)]
