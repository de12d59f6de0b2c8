"""Where the unfinished folder stays, where it goes, and who may write into it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from quantc import api
from quantc.checkpoint.writer import CheckpointWriter
from quantc.errors import CalibrationError, ModelError, UsageError
from quantc.progress import LogProgress
from quantc.report import read_report
from tests.whole.resume.runs import BLOCK, FAST, files_of, interrupt, quantize


def test_hours_of_work_are_not_thrown_away_unasked(kept: Path, model: Path, tmp_path: Path) -> None:
    before = files_of(kept)
    with pytest.raises(UsageError) as caught:
        quantize(model, tmp_path / "out", **FAST)
    assert str(caught.value) == (
        f"{kept} holds 2 of 4 blocks of an interrupted run; pass --resume to continue it, or --force to start anew."
    )
    assert files_of(kept) == before
    quantize(model, tmp_path / "out", force=True, **FAST)
    assert read_report(tmp_path / "out")["notes"] == []


def test_where_there_is_nothing_to_resume_a_run_starts(model: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Listener(LogProgress):
        def note(self, text: str) -> None:
            told.append(text)

    quantize(model, tmp_path / "out", True, progress=Listener(), **FAST)
    assert told == [f"there is no interrupted run of {tmp_path / 'out'} to resume; this one starts anew"]


def test_two_runs_do_not_write_into_one_folder(kept: Path, model: Path, tmp_path: Path) -> None:
    for options in ({"resume": True}, {"force": True}):
        with CheckpointWriter(tmp_path / "out", **options), pytest.raises(UsageError) as caught:
            quantize(model, tmp_path / "out", **options, **FAST)
        assert str(caught.value) == (
            f"another run is writing into {kept}; wait until it is done, or choose another --out."
        )
        assert "__notes__" not in vars(caught.value)


# What stays, and what goes


def test_before_the_first_block_nothing_stays(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = interrupt(monkeypatch, lambda: quantize(model, tmp_path / "out", **FAST), BLOCK.format(0))
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (RuntimeError("a bug"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ModelError("NaN"), False),
        (CalibrationError("NaN"), False),
    ],
)
def test_what_the_same_input_would_meet_again_leaves_nothing(
    error: BaseException, stays: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, lambda: quantize(model, tmp_path / "out", **FAST), BLOCK.format(2), error)
    assert (tmp_path / "out.unfinished").exists() == stays
    assert hasattr(error, "__notes__") == stays


def test_points_of_a_curve_are_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(model / "text.txt")
    settings: dict[str, Any] = {"calib": text, "samples": 8, "seq_len": 32, "text": text, "verify": 1}
    error = interrupt(monkeypatch, lambda: api.pareto(model, out=tmp_path, **settings), BLOCK.format(2))
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(error, "__notes__")
