"""The tables of runtimes that quantc writes for."""

from __future__ import annotations

from quantc.planning.targets import RUNTIMES, described

from ..common import markdown

COLUMNS = ("bits", "groups", "zero points", "widths", "embedding, head", "rotations", "checked on")


def runtimes() -> str:
    """Return what each runtime holds, a line each."""
    rows = [described(name) for name in RUNTIMES]
    return markdown([{"target": f"`{row['target']}`", **{name: row[name] for name in COLUMNS}} for row in rows])


def runtimes_short() -> str:
    """Return the same in few words."""
    rows = []
    for name, runtime in RUNTIMES.items():
        long = described(name)
        rows.append(
            {
                "target": f"`{name}`",
                "bits": _ranges(runtime.bits) or long["bits"].replace(" to ", "–"),
                "groups": long["groups"],
                "zero points": long["zero points"],
                "widths": long["widths"].partition(", ")[0].replace("; one with zero points", " if symmetric"),
                "embedding, head": long["embedding, head"],
                "rotations": "online" if runtime.rotations else "folded",
                "how it is known": runtime.checked,
            }
        )
    return markdown(rows)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return ascending numbers with runs of neighbours as ranges: 2–4, 8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


TABLES = {"runtimes": runtimes, "runtimes-short": runtimes_short}
