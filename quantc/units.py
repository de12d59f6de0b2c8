"""Numbers as a person reads and writes them: bytes, seconds and errors. Used by the console and the HTML report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import floor, isfinite, log10
from typing import Any

from .errors import UsageError, printable

FLOAT_DTYPES = ("float32", "bfloat16", "float16")  # torch's names of what a model can be computed in


def size(count: float) -> str:
    """Return bytes in decimal units with three digits, such as 97.3 MB; n/a TB when not finite."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{number(value)} {unit}"
        value /= 1000
    return f"{number(value)} TB"


SIZE_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_size(text: str) -> int:
    """Return bytes from text such as 300MiB, 1.5 GB or 123456; raises UsageError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in SIZE_UNITS:
        raise UsageError(f"{text!r} is no size; 300MiB, 1.5GB and 300000000 are examples.")
    value = float(found[1]) * SIZE_UNITS[found[2]]
    if not isfinite(value):
        raise UsageError(f"{text!r} is more than any size; 300MiB, 1.5GB and 300000000 are examples.")
    return int(value)


def duration(seconds: float) -> str:
    """Return seconds as 4.2 s, 3 min 05 s or 2 h 07 min; n/a when not finite."""
    if not isfinite(seconds):
        return "n/a"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


DURATION_UNITS = {"s": 1, "": 1, "min": 60, "m": 60, "h": 3600}


def parse_duration(text: str) -> float:
    """Return seconds from text such as 90s, 10min or 1.5h; raises UsageError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in DURATION_UNITS:
        raise UsageError(f"{text!r} is no time; 90s, 10min and 1.5h are examples.")
    seconds = float(found[1]) * DURATION_UNITS[found[2]]
    if not isfinite(seconds):
        raise UsageError(f"{text!r} is more than any time; 90s, 10min and 1.5h are examples.")
    return seconds


def clock(seconds: float) -> str:
    """Return seconds as a running clock, such as 3:05 or 2:07:00."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure with `digits` significant digits, without an exponent where possible; n/a when not finite."""
    if value is None or not isfinite(value):
        return "n/a"
    if value != 0 and not 1e-5 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    magnitude = floor(log10(abs(value))) if value else digits
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def ratio(part: float, whole: float) -> str:
    """Return part / whole with three digits; n/a where the whole is unknown."""
    return number(part / whole) if whole else "n/a"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as 1 linear or 3 linears."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(names: Sequence[str]) -> str:
    """Return names in a sentence: a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def rewritten(rewrites: dict[str, dict[str, int]]) -> list[str]:
    """Return a line for each pass: how many activations of which kind, or how many tensors, it has rewritten."""
    return [
        f"{by}: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) for by, kinds in rewrites.items()
    ]


def to_printable(value: Any) -> Any:
    """Return nested mappings and sequences with every text in them safe to show on a terminal."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {to_printable(key): to_printable(item) for key, item in value.items()}
    return [to_printable(item) for item in value] if isinstance(value, (list, tuple)) else value
