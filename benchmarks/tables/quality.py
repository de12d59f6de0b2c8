"""Tables of quality: presets, other quantizers, budgets, targets, calibration text and sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..common import markdown, uniform_at
from .results import MISSING, MODELS, find, gigabytes, load, megabytes, rounded, seconds, uniform

METHODS = {
    "rtn": "round to nearest", "plain-gptq": "GPTQ as published", "fast": "quantc `fast`",
    "balanced": "quantc `balanced`", "best": "quantc `best`",
}  # fmt: skip
COLUMNS = [(model, bits) for model in MODELS for bits in (4, 3, 2)]
SHORT = {"SmolLM2-135M": "SmolLM2", "Gemma-3-270M": "Gemma 3", "stories15M": "stories15M"}


def by_method(cell: Callable[[dict[str, Any] | None], str], columns: Iterable[tuple[str, int]] = COLUMNS) -> str:
    """Return a table with a row for each method and a column for each model and width."""
    return markdown([
        {"method": label, **{f"{SHORT[model]}, {bits}": cell(uniform(model, bits, method)) for model, bits in columns}}
        for method, label in METHODS.items()
    ])  # fmt: skip


def presets_kl() -> str:
    return by_method(lambda row: rounded(row and row["mean_kl"]))


def presets_perplexity() -> str:
    rows = [find("perplexity.json", model=model, bits=4, method="fast", group_size=64) for model in MODELS]
    originals = ", ".join(f"{SHORT[row['model']]} {row['perplexity_original']:.2f}" for row in rows if row)
    return f"{by_method(_perplexity)}\n\nThe originals: {originals}."


def _perplexity(row: dict[str, Any] | None) -> str:
    if row is None:
        return MISSING
    return f"{row['perplexity']:.1f}" if row["perplexity"] < 1000 else "over 1000"


def presets_cpu_seconds() -> str:
    return by_method(lambda row: seconds(row and row["cpu_seconds"]), [(model, 3) for model in MODELS])


def quantizers() -> str:
    """The table of the README: SmolLM2-135M at 3 bits by several tools."""
    rows = [_tool("round to nearest", uniform("SmolLM2-135M", 3, "rtn"))]
    rows.append(_tool("GPTQ as published", uniform("SmolLM2-135M", 3, "plain-gptq")))
    learned = find("autoround.json", tool="AutoRound, 50 steps") or {}
    gptq = uniform("SmolLM2-135M", 3, "plain-gptq") or {}
    rows.append(_tool("AutoRound, 50 steps", {**learned, "bits_per_weight": gptq["bits_per_weight"]}))
    for name in ("fast", "balanced", "best"):
        rows.append(_tool(f"**quantc `{name}`**", uniform("SmolLM2-135M", 3, name)))
    rows.append(_tool("**quantc `balanced`, mixed widths**", _mixed("SmolLM2-135M", 3.25)))
    for name in ("balanced", "best"):
        walks = find("trellis.json", model="SmolLM2-135M", bits=3, method=name) or {}
        rows.append(_tool(f"**quantc `{name}`, trellis codes**", {**walks, "cpu_seconds": None}))  # beside other work
    return markdown(rows)


def _tool(name: str, row: dict[str, Any] | None) -> dict[str, str]:
    row = row or {}
    return {
        "quantizer": name, "bits/weight": f"{row['bits_per_weight']:.2f}", "KL": rounded(row["mean_kl"]),
        "CPU s": seconds(row.get("cpu_seconds")),
    }  # fmt: skip


def _mixed(model: str, average: float) -> dict[str, Any] | None:
    return find("budgets.json", model=model, bits=average, group_size=None)


def autoround() -> str:
    return markdown([
        {
            "tool": row["tool"], "KL": rounded(row["mean_kl"]), "perplexity": f"{row['perplexity']:.1f}",
            "CPU s": seconds(row["cpu_seconds"]), "peak memory": gigabytes(row["peak_rss_bytes"]),
        }
        for row in load("autoround.json")["rows"]
    ])  # fmt: skip


def budgets() -> str:
    rows = load("budgets.json")
    return markdown([
        {
            "average bits": f"{average:g}",
            **{f"{SHORT[model]}, {what}": text for model in MODELS[:2] for what, text in _budget(model, average, rows)},
        }
        for average in sorted({row["bits"] for row in rows if row["group_size"] is None})
    ])  # fmt: skip


def _budget(model: str, average: float, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    row = _mixed(model, average) or {}
    same = uniform_at(row["bits_per_weight"], [other for other in rows if other["model"] == model])
    return [
        ("KL", rounded(row["mean_kl"])),
        ("one width", rounded(same)),
        ("file", megabytes(row["weights_bytes"])),
    ]


def plans() -> str:
    rows = load("plans.json")
    cases = list(dict.fromkeys((row["model"], row["settings"]["text"]) for row in rows))
    return markdown([_plans(model, text, rows) for model, text in cases])


def _plans(model: str, text: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    found = [row for row in rows if (row["model"], row["settings"]["text"]) == (model, text)]
    random = sorted(row["mean_kl"] for row in found if row["plan"].startswith("random"))
    kl = {row["plan"]: rounded(row["mean_kl"]) for row in found}
    return {
        "model, text": f"{model}, {text.removesuffix('.txt')}", "quantc's plan": kl["solver"],
        "llama.cpp's rule of thumb": kl["heuristic"], f"best of {len(random)} random plans": rounded(random[0]),
    }  # fmt: skip


def targets() -> str:
    return markdown([
        {
            "model": row["model"], "`--max-kl`": f"{row['target']:g}", "KL on other text": rounded(row["mean_kl"]),
            "bits/weight": f"{row['bits_per_weight']:.2f}", "CPU s": seconds(row["cpu_seconds"]),
        }
        for row in load("targets.json")["rows"]
    ])  # fmt: skip


def calibration_text() -> str:
    cases = [("SmolLM2-135M", "plain-gptq"), ("stories15M", "plain-gptq"), ("stories15M", "best-untrained")]
    return markdown([
        {
            "model": model, "method": METHODS.get(method, "`best` without its training"),
            "built-in text": rounded(_calibrated(model, method)["mean_kl"]),
            "WikiText-2": rounded((uniform(model, 3, method) or {})["mean_kl"]),
        }
        for model, method in cases
    ])  # fmt: skip


def _calibrated(model: str, method: str) -> dict[str, Any]:
    return find("builtin_and_head8.json", model=model, method=method, bits=3, group_size=64) or {}


def sparsity() -> str:
    cases = {
        "4 bits, half of the groups dropped": ("gptq-s50", 4, None),
        "4 bits, two of four": ("gptq-2of4", 4, 64), "3 bits, nothing dropped": ("fast", 3, 64),
        "2 bits, nothing dropped": ("fast", 2, 64),
    }  # fmt: skip
    return markdown([
        {"weights": label, "bits/weight": f"{row['bits_per_weight']:.2f}", "KL": rounded(row["mean_kl"])}
        for label, (method, bits, group) in cases.items()
        if (row := find("perplexity.json", model="Gemma-3-270M", bits=bits, method=method, group_size=group))
    ])  # fmt: skip


def tasks() -> str:
    """Accuracy beside KL divergence, the original first."""
    return markdown([
        {
            "bits/weight": "original" if row["bits"] is None else f"{row['bits_per_weight']:.2f}",
            "KL": MISSING if row["bits"] is None else rounded(row["mean_kl"]),
            **{
                f"{score['task']}, {score['metric']}": f"{score['value']:.2f} ± {score['standard_error']:.2f}"
                for score in row["tasks"]
            },
        }
        for row in load("tasks.json")["rows"]
    ])  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "presets-kl": presets_kl, "presets-perplexity": presets_perplexity, "presets-cpu-seconds": presets_cpu_seconds,
    "quantizers": quantizers, "autoround": autoround, "budgets": budgets, "plans": plans,
    "targets": targets, "calibration-text": calibration_text, "sparsity": sparsity, "tasks": tasks,
}  # fmt: skip
