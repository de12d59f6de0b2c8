"""Runs that are interrupted at a tensor, and what they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.checkpoint.reader import verify
from quantc.checkpoint.writer import CheckpointWriter
from quantc.report import read_report

BLOCK = "model.layers.{}."
FAST = {"preset": "fast", "bits": 4, "group_size": 16, "method": "rtn"}
TINY = Path(__file__).parents[2] / "tiny_model" / "model"
PASSES: dict[str, list[Any]] = {
    "uniform": [],
    "scaled": ["scale", "rotate"],
    "folded": [{"rotate": {"residual": "folded", "value": "folded"}}],
    "grouped": ["importance", "group_channels", "rotate", {"quantize": {"rounds": 1, "correct": 0.5}}],
    "sparse": [{"sparsify": {"sparsity": 0.5}}],
    "two_of_four": ["importance", {"sparsify": {"sparsity": "2:4"}}],
    "compensated": [{"compensate": {"rank": 2}}, "scale"],
    "tuned": ["rotate", "quantize", {"tune": {"steps": 3}}],
    "distilled": ["quantize", {"distill": {"steps": 2}}],
}


def quantize(model: Path, out: Path, resume: bool = False, **settings: Any) -> None:
    options = {"calib": str(model / "text.txt"), "samples": 4, "seq_len": 32, **settings}
    quantc.quantize(model, out=out, resume=resume, **options)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint; of the report what does not tell of the run itself."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    for key in ("cpu_seconds", "wall_seconds", "peak_rss_bytes", "output"):
        del report[key]
    of_the_run = ("interrupted run", " a block (median)")
    report["notes"] = [note for note in report["notes"] if not any(words in note for words in of_the_run)]
    return files | {"report": report}


def interrupt(
    patched: pytest.MonkeyPatch,
    run: Callable[[], object],
    tensor: str,
    error: BaseException | None = None,
    method: str = "add",
    skip: int = 0,
) -> BaseException:
    """Run until a tensor is to be written (by `method`) whose name starts so; then the error comes instead of it.

    skip: of so many such tensors before.
    """
    original, seen = getattr(CheckpointWriter, method), []
    raised = KeyboardInterrupt() if error is None else error

    def fail(self: CheckpointWriter, name: str, value: torch.Tensor) -> None:
        seen.extend([name] if name.startswith(tensor) else [])
        if len(seen) > skip:
            raise raised
        original(self, name, value)

    with patched.context() as patch:
        patch.setattr(CheckpointWriter, method, fail)
        with pytest.raises(type(raised)):
            run()
    return raised


def check(patched: pytest.MonkeyPatch, model: Path, folder: Path, stops: list[str], **settings: Any) -> list[str]:
    """Interrupt a run at each of these tensors and compare with one that is not; the notes of its report."""
    quantize(model, folder / "whole", **settings)
    for stop in stops:
        interrupt(patched, lambda: quantize(model, folder / "out", True, **settings), stop, skip=2)
        assert (folder / "out.unfinished").exists()
    quantize(model, folder / "out", True, **settings)
    assert contents(folder / "out") == contents(folder / "whole")
    assert not (folder / "out.unfinished").exists()
    verify(folder / "out")
    return read_report(folder / "out")["notes"]


def recipe(folder: Path, passes: list[Any]) -> Path:
    rounds = any(item == "quantize" or (isinstance(item, dict) and "quantize" in item) for item in passes)
    allocate = {"allocate": {"bits": 3, "group_size": 16}}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"version": 1, "passes": [allocate, *passes, *([] if rounds else ["quantize"])]}))
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
