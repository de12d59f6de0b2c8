"""The command line's answers as rich tables. Each function takes plain mappings and returns what to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..spec import QuantSpec
from ..units import duration, number, plural, ratio, rewritten, size
from .pieces import Facts, command_line, dimensions, fact_table, heading, indented, section, table_of

if TYPE_CHECKING:
    from ..pipeline.run import Run
    from ..planning.pareto import Curve

WORST = 5  # linears named in the summary of a run


def quantized(report: dict[str, Any], *next_commands: list[str]) -> RenderableType:
    """Return the summary of a run: what was written, its true size, where it hurts, and what to type next."""
    parts: list[RenderableType] = [
        Text.assemble(("Wrote ", "bold green"), (report["output"], "bold")),
        fact_table(_totals(report)),
    ]
    worst = sorted(report["linears"], key=_error, reverse=True)[:WORST]
    if worst:
        parts += [heading("Largest errors"), _worst(worst)]
    parts += _remarks(report)
    parts += [heading("Next"), *map(command_line, next_commands)]
    return Group(*parts)


def tensors(rows: list[dict[str, Any]]) -> list[RenderableType]:
    """Return the table of a GGUF file's tensors; nothing where there are none."""
    table = table_of(["tensor", "type", "shape", "bytes", "why"], numeric={"shape", "bytes"})
    for row in rows:
        table.add_row(row["name"], row["type"], dimensions(row["shape"]), f"{row['bytes']:,}", row.get("why", ""))
    return [heading("Tensors"), table] if rows else []


def widths(run: Run) -> list[dict[str, Any]]:
    """Return what a plan gives to linears of one name, over every block: count, average, smallest and largest bits.

    Those of codes: 0 for weights that are dropped, 16 for linears that are kept.
    """
    counts: dict[str, int] = {}
    weights: dict[str, dict[int, float]] = {}
    for name, linear in run.graph.linears.items():
        spec, kind = run.plan.specs[name], name.rpartition(".")[2]
        counts[kind] = counts.get(kind, 0) + 1
        for bits, share in ({16: 1.0} if spec is None else spec.code_widths(linear.shape[0])).items():
            found = weights.setdefault(kind, {})
            found[bits] = found.get(bits, 0) + linear.weights * share
    return [
        {
            "linear": kind,
            "count": counts[kind],
            "bits": sum(bits * share for bits, share in found.items()) / sum(found.values()),
            "smallest": min(found),
            "largest": max(found),
        }
        for kind, found in weights.items()
    ]


def planned(rows: list[dict[str, Any]], notes: list[str], next_command: list[str]) -> RenderableType:
    """Return the widths that a plan gives to each kind of linear, and how to build it."""
    table = table_of(
        ["linears", "count", "bits of a code", "from", "to"], numeric={"count", "bits of a code", "from", "to"}
    )
    for row in rows:
        table.add_row(row["linear"], str(row["count"]), f"{row['bits']:.2f}", str(row["smallest"]), str(row["largest"]))
    written = Text.assemble(("Wrote ", "bold green"), (next_command[next_command.index("--plan") + 1], "bold"))
    parts: list[RenderableType] = [written, table, *(Text(note) for note in notes)]
    return Group(*parts, heading("Next"), command_line(next_command))


def swept(curve: Curve, next_command: list[str]) -> RenderableType:
    """Return the points of a curve, uniform widths beside them, and how to build one of the points."""
    from ..planning.pareto import explained, table

    written = Text.assemble(("Wrote ", "bold green"), (" and ".join(str(file) for file in curve.files), "bold"))
    parts: list[RenderableType] = [written, Text(explained(curve), style="dim"), _points(*table(curve.points))]
    if curve.uniform:
        parts += [heading("The same width everywhere"), _points(*table(curve.uniform))]
    parts += section("Notes", [Text(note) for note in curve.notes])
    return Group(*parts, heading("Next, or with the option of another point"), command_line(next_command))


def inspected(report: dict[str, Any]) -> RenderableType:
    """Return the table of all linears, then the totals."""
    stacks = any(linear["experts"] for linear in report["linears"])
    columns = ["linear", "spec", "shape", *(["experts"] if stacks else []), "bits/weight", "error", "method"]
    table = table_of(columns, numeric={"shape", "experts", "bits/weight", "error"})
    for linear in report["linears"]:
        table.add_row(*_inspect_row(linear, stacks))
    parts = [table, heading(report["output"]), fact_table(_totals(report))]
    return Group(*parts, *_remarks(report))


def evaluated(result: dict[str, Any], against: str | None) -> RenderableType:
    """Return perplexity, divergence, size and speed, then tasks; what was not measured is left out."""
    facts = _of_text(result, against) if result["windows"] else []
    read = f"{result['positions']:,} predictions in {plural(result['windows'], 'window')}"
    bits = number(result["bits_per_weight"], 4)
    facts += [
        ("computed in", result["dtype"], result["dtype_reason"]),
        *([("text", read, "")] if result["windows"] else []),
        ("bits per weight", bits, "all that is stored for the linears in the blocks"),
        ("weights", size(result["weights_bytes"]), "all weight files"),
        ("decode speed", f"{number(result['tokens_per_second'])} tokens/s", "one sequence, greedy"),
        ("peak memory", size(result["peak_rss_bytes"]), ""),
    ]
    tasks = result.get("tasks", ())
    return Group(fact_table(facts), *([heading("Tasks"), indented(_tasks(tasks, against))] if tasks else []))


def _of_text(result: dict[str, Any], against: str | None) -> Facts:
    original = "" if against is None else f"{against} has {number(result['perplexity_original'], 4)}"
    facts: Facts = [("perplexity", number(result["perplexity"], 4), original)]
    if against is not None:
        tail = f"mean, in nats; 99th percentile {number(result['p99_kl'])}"
        agreement = _percent(result["top1_agreement"])
        facts += [
            ("KL divergence", number(result["mean_kl"]), tail),
            ("top-1 agreement", agreement, "of predictions find the same token likeliest"),
        ]
    return facts


def _tasks(rows: Sequence[dict[str, Any]], against: str | None) -> RenderableType:
    columns = ["value", "standard error", *([] if against is None else ["original"]), "questions", "few-shot"]
    table = table_of(["task", "metric", *columns], numeric=set(columns))
    for row in rows:
        figures = [row["value"], row["standard_error"], *([] if against is None else [row["original"]])]
        shown = ["n/a" if figure is None else f"{figure:.4f}" for figure in figures]
        table.add_row(row["task"], row["metric"], *shown, f"{row['samples']:,}", str(row["few_shot"]))
    return table


def exported(result: dict[str, Any]) -> RenderableType:
    """Return what a file of another container holds, what storing it has rounded, and who has read it."""
    types = ", ".join(
        f"{name} ({plural(count, 'tensor')}, {size(total)})" for name, (count, total) in result["types"].items()
    )
    facts: Facts = [
        (
            "size",
            size(result["bytes"]),
            f"{number(result['bits_per_weight'], 4)} bits per weight, embedding and head counted",
        ),
        ("types", types, ""),
        ("read back", "every block", "by gguf-py, equal to the checkpoint's to the bit" + _minima(result)),
    ]
    if (agreement := result["agreement"]) is not None:
        text = (
            f"mean KL divergence {number(agreement['kl'])} nats over {plural(agreement['tokens'], 'token')}, relative "
        )
        text += f"error {number(agreement['error'])}; it rounds activations to 8 bits"
        facts.append(("llama.cpp", "agrees", text))
    written = Text.assemble(("Wrote ", "bold green"), (result["output"], "bold"))
    return Group(written, fact_table(facts), *section("Notes", [Text(note) for note in result["notes"]]))


def exported_folder(result: dict[str, Any]) -> RenderableType:
    """Return what a folder for another runtime holds, and who has read it."""
    schemes = ", ".join(f"{label} ({plural(count, 'layer')})" for label, count in result["schemes"].items())
    facts: Facts = [
        ("size", size(result["bytes"]), f"{number(result['bits_per_weight'], 4)} bits per weight inside the blocks"),
        ("layers", schemes, f"floats are {result['dtype']}"),
        ("container", result["container"], f"for {result['readers']}"),
        ("read back", "every layer", "from the new folder, and compared with the checkpoint's"),
    ]
    if (agreement := result["agreement"]) is not None:
        tokens = plural(agreement["tokens"], "token")
        facts.append(("transformers", "agrees", f"relative error {number(agreement['error'])} of logits, {tokens}"))
    written = Text.assemble(("Wrote ", "bold green"), (result["output"], "bold"))
    return Group(written, fact_table(facts), *section("Notes", [Text(note) for note in result["notes"]]))


TARGET_COLUMNS = ("target", "bits", "groups", "zero points", "widths", "embedding, head", "rotations")


def targets(rows: list[dict[str, Any]]) -> RenderableType:
    """Return the runtimes that quantc writes for, a line each."""
    table = table_of(list(TARGET_COLUMNS), numeric=set())
    for row in rows:
        table.add_row(*(row[column] for column in TARGET_COLUMNS))
    return table


def target(row: dict[str, Any]) -> RenderableType:
    """Return all that is known of one."""
    return fact_table([(name, text, "") for name, text in row.items()])


def _minima(result: dict[str, Any]) -> str:
    """Say what storing minima in float16 has changed, where there are minima."""
    if not result["minimum_largest"]:
        return ""
    largest, rms = number(100 * result["minimum_largest"]), number(100 * result["minimum_rms"])
    return f" but for minima in float16: {largest} % of a step of the grid at most, {rms} % rms"


def label(spec: dict[str, Any]) -> str:
    """Return the short name of a spec that was stored as a mapping, such as w4g128."""
    return QuantSpec.from_dict(spec).label()


def _totals(report: dict[str, Any]) -> Facts:
    count = len(report["linears"])
    facts: Facts = [
        (
            "bits per weight",
            number(report["bits_per_weight"], 4),
            f"all that is stored for {count:,} linears",
        ),
        ("weights", size(report["weights_bytes"]), _against_source(report)),
    ]
    if report["expert_fallbacks"]:
        text = "saw too few calibration rows and were rounded to nearest"
        facts.append(("experts", f"{report['expert_fallbacks']:,}", text))
    if report["calibration"]:
        facts.append(("calibration", report["calibration"], ""))
    cpu = f"{duration(report['cpu_seconds'])} of CPU time"
    time, memory = duration(report["wall_seconds"]), size(report["peak_rss_bytes"])
    return [*facts, ("time", time, cpu), ("peak memory", memory, "")]


def _against_source(report: dict[str, Any]) -> str:
    source = report["source_bytes"]
    return f"{ratio(report['weights_bytes'], source)} of the source's {size(source)}" if source else ""


def _worst(linears: list[dict[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for linear in linears:
        table.add_row(linear["name"], label(linear["spec"]), number(linear["error"]), linear["method"])
    return indented(table)


def _points(heads: list[str], rows: list[list[str]]) -> RenderableType:
    table = table_of(heads, numeric=set(heads[1:-1]))
    for row in rows:
        table.add_row(*row)
    return table


def _inspect_row(linear: dict[str, Any], stacks: bool) -> list[str]:
    experts = [str(linear["experts"] or "")] if stacks else []
    figures = [number(linear["bits_per_weight"], 4), number(linear["error"])]
    counts = [(linear["fallbacks"], "fallback"), (linear["dead_inputs"], "dead input")]
    unusual = ", ".join(plural(count, noun) for count, noun in counts if count)
    return [
        linear["name"],
        label(linear["spec"]),
        dimensions(linear["shape"]),
        *experts,
        *figures,
        linear["method"] + (f" ({unusual})" if unusual else ""),
    ]


def _remarks(report: dict[str, Any]) -> list[RenderableType]:
    """Return what was rewritten, refused and left in floats, and the notes."""
    return [
        *section("Rewritten", [Text(line) for line in rewritten(report["rewrites"])]),
        *section("Not rewritten", _by_reason(report["refused"])),
        *section("Kept as they are", _by_reason(report["kept"])),
        *section("Notes", [Text(note) for note in report["notes"]]),
    ]


def _by_reason(reasons_of: dict[str, str]) -> list[Text]:
    names_of: dict[str, list[str]] = {}
    for name, reason in reasons_of.items():
        names_of.setdefault(reason, []).append(name)
    return [_reason_line(names, reason) for reason, names in names_of.items()]


def _reason_line(names: list[str], reason: str) -> Text:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return Text.assemble(", ".join(names[:2]) + more, (f"  {reason}", "dim"))


def _error(linear: dict[str, Any]) -> float:
    """Return a sort key that puts an error which is NaN or missing first, as the worst."""
    error = linear["error"]
    return error if error is not None and error == error else float("inf")


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{number(100 * share)} %"
