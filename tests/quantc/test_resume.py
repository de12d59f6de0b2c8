"""A run that was interrupted and resumed writes what an uninterrupted one writes, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc import sweep
from quantc.checkpoint import verify
from quantc.checkpoint_writer import CheckpointWriter
from quantc.report import read_report
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer

BLOCK = "model.layers.{}."
RESUMED = "{} of {} blocks are from an interrupted run; times are of the last run alone"


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    save_with_tokenizer(build("smollm3"), folder / "model")
    return folder


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint but the report, and of that what does not tell of the run itself."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    for key in ("cpu_seconds", "wall_seconds", "peak_rss_bytes", "output"):
        del report[key]
    report["notes"] = [
        note for note in report["notes"] if "interrupted run" not in note and " a block (median)" not in note
    ]
    return files | {"report": report}


def interrupted(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], tensor: str, error: BaseException | None = None
) -> None:
    """Run until a tensor is to be written whose name starts so, and the error comes instead of it."""
    add = CheckpointWriter.add

    def add_or_fail(self: CheckpointWriter, name: str, value: torch.Tensor) -> None:
        if name.startswith(tensor):
            raise error or KeyboardInterrupt
        add(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "add", add_or_fail)
        with pytest.raises(type(error) if error else KeyboardInterrupt):
            run()


PASSES = {
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


def recipe(folder: Path, passes: list[Any], **allocate: Any) -> Path:
    rounds = any(item == "quantize" or (isinstance(item, dict) and "quantize" in item) for item in passes)
    content = {
        "version": 1,
        "passes": [{"allocate": {"bits": 3, "group_size": 16, **allocate}}, *passes, *([] if rounds else ["quantize"])],
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_goes_on_as_if_nothing_had_happened(
    name: str, four_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"recipe": recipe(tmp_path, PASSES[name])}
    check(monkeypatch, four_blocks / "model", tmp_path, [BLOCK.format(2)], **settings)


def check(monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, stops: list[str], **settings: Any) -> list[str]:
    """Interrupt a run as often as `stops` says and compare with one that is not; returns the notes of its report."""

    def run(out: Path, resume: bool) -> None:
        options = {"calib": str(model / "text.txt"), "samples": 4, "seq_len": 32, **settings}
        quantc.quantize(model, out=out, resume=resume, **options)

    run(folder / "whole", False)
    for stop in stops:
        interrupted(monkeypatch, lambda: run(folder / "out", True), stop)
    run(folder / "out", True)
    assert contents(folder / "out") == contents(folder / "whole")
    assert not (folder / "out.unfinished").exists()
    verify(folder / "out")
    return read_report(folder / "out")["notes"]
