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
CASES = {  # model and calibration text -> the head of its columns
    ("SmolLM2-135M", WIKITEXT): "SmolLM2", ("Gemma-3-270M", WIKITEXT): "Gemma 3",
    ("stories15M", OWN_TEXT): "stories15M",
}  # fmt: skip
MAKERS = {"llama.cpp": "llama.cpp", "fast": "quantc"}


def _row(model: str, calibration: str, mix: str, maker: str) -> dict[str, Any] | None:
    return find("gguf.json", model=model, calibration=calibration, mix=mix, maker=maker)


def gguf() -> str:
    """One row for each mix: the size of its file, and the divergences of that and of quantc's, for every model."""
    return markdown([_by_model(mix) for mix in MIXES])


def _by_model(mix: str) -> dict[str, str]:
    cells = {"size of": f"`{mix}`"}
    for (model, calibration), head in CASES.items():
        theirs = _row(model, calibration, mix, "llama.cpp")
        cells[head] = megabytes(theirs["bytes"]) if theirs else MISSING
        for maker, label in MAKERS.items():
            cells[f"{head}, {label}"] = _kl(_row(model, calibration, mix, maker), theirs)
    return cells


def _kl(row: dict[str, Any] | None, theirs: dict[str, Any] | None) -> str:
    """Return a divergence, with the size of a file that is smaller by a hundredth and more."""
    if row is None or theirs is None:
        return MISSING
    smaller = row["bytes"] < SAME_SIZE * theirs["bytes"]
    return f"{rounded(row['kl'])} in {megabytes(row['bytes'])}" if smaller else rounded(row["kl"])


def gguf_short() -> str:
    """The table of the README: both divergences of every model."""
    return markdown([
        {
            "size of": f"`{mix}`",
            **{
                f"{head}, {label}": rounded(row and row["kl"])
                for (model, calibration), head in CASES.items()
                for maker, label in MAKERS.items()
                for row in [_row(model, calibration, mix, maker)]
            },
        }
        for mix in ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
    ])  # fmt: skip


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
    "gguf": gguf, "gguf-short": gguf_short, "autoround-gguf": autoround_gguf, "grids": grids, "grid-kl": grid_kl,
}  # fmt: skip
