"""Tables of GGUF files and of the grids that weights can be stored on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantc.planning.targets import RUNTIMES
from quantc.spec import spec_of_label

from ..common import markdown
from .results import MISSING, find, load, megabytes, rounded, seconds

MIXES = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
SAME_SIZE = 0.99  # of two files; what fits below is left out where a single large tensor is all that could grow
OWN_TEXT = "self"
WIKITEXT = "wikitext2-valid.txt"
COLUMNS = {  # head -> model, calibration text, preset
    "SmolLM2": ("SmolLM2-135M", WIKITEXT, "fast"), "Gemma 3": ("Gemma-3-270M", WIKITEXT, "fast"),
    "stories15M": ("stories15M", OWN_TEXT, "fast"), "stories15M, `best`": ("stories15M", OWN_TEXT, "best"),
    "stories15M, WikiText-2": ("stories15M", WIKITEXT, "fast"),
}  # fmt: skip


def _row(model: str, calibration: str, mix: str, maker: str) -> dict[str, Any] | None:
    return find("gguf.json", model=model, calibration=calibration, mix=mix, maker=maker)


def gguf() -> str:
    """One row for each mix: for every model the divergence of llama.cpp's file and that of quantc's."""
    return markdown([
        {"size of": f"`{mix}`", **{head: _both(mix, *column) for head, column in COLUMNS.items()}} for mix in MIXES
    ])  # fmt: skip


def _both(mix: str, model: str, calibration: str, preset: str) -> str:
    theirs, ours = (_row(model, calibration, mix, maker) for maker in ("llama.cpp", preset))
    if theirs is None or ours is None:
        return MISSING
    smaller = ours["bytes"] < SAME_SIZE * theirs["bytes"]
    size = f" in {ours['bytes'] / theirs['bytes']:.0%}" if smaller else ""
    return f"{rounded(theirs['kl'])} / {rounded(ours['kl'])}{size}"


def autoround_gguf() -> str:
    return markdown([
        {
            "file": row["tool"], "size of": f"`{row['type'].removeprefix('gguf:').upper()}`",
            "size": megabytes(row["bytes"]), "KL": rounded(row["kl"]), "CPU s": seconds(row["cpu_seconds"]),
        }
        for row in load("autoround_gguf.json")["rows"]
    ])  # fmt: skip


def grids() -> str:
    """Every grid: bits, error on Gaussian weights and on a model's linears, and who reads it."""
    return markdown([_grid(row) for row in load("grids.json")["gaussian"]])


def _grid(row: dict[str, Any]) -> dict[str, str]:
    nearest, fed_back = (_on_model(row["grid"], "stories15M", method) for method in ("rtn", "gptq"))
    spec = spec_of_label(row["grid"])
    readers = ["quantc", *(["llama.cpp"] if spec and spec.code in RUNTIMES["gguf"].codes else [])]
    if row["grid"] in RUNTIMES["compressed-tensors"].others:
        readers.append("transformers, vLLM")
    return {
        "grid": f"`{row['grid']}`", "bits/weight": f"{row['bits_per_weight']:.3f}", "Gaussian": _error(row["error"]),
        "linears, to nearest": _error(nearest.get("error")), "linears, GPTQ": _error(fed_back.get("error")),
        "read by": ", ".join(readers),
    }  # fmt: skip


def grid_kl() -> str:
    """What error feedback takes off on the tables of values, on three models."""
    names = ("nf4-g64", "nf4_dq-g64", "mxfp4", "nvfp4", "fp8-grow")
    cases = [(model, method) for model in ("SmolLM2-135M", "Gemma-3-270M", "stories15M") for method in ("rtn", "gptq")]
    labels = {"rtn": "to nearest", "gptq": "GPTQ"}
    return markdown([
        {
            "grid": f"`{name}`",
            **{
                f"{model.split('-')[0]}, {labels[method]}": rounded(_on_model(name, model, method).get("mean_kl"))
                for model, method in cases
            },
        }
        for name in names
    ])  # fmt: skip


def _on_model(grid: str, model: str, method: str) -> dict[str, Any]:
    return find("grids.json", model=model, grid=grid, method=method) or {}


def _error(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2e}"


TABLES: dict[str, Callable[[], str]] = {
    "gguf": gguf, "autoround-gguf": autoround_gguf, "grids": grids, "grid-kl": grid_kl,
}  # fmt: skip
