"""A run is resumed with the settings, model, text and threads it was begun with, or not at all."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.errors import UsageError
from tests.whole.resume.runs import BLOCK, FAST, files_of, interrupt, quantize


def test_other_settings_are_refused_by_name_and_touch_nothing(kept: Path, model: Path, tmp_path: Path) -> None:
    before = files_of(kept)
    other = shutil.copytree(model, tmp_path / "other")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (model, {**FAST, "bits": 3}, "allocate bits 4, and this run has 3"),
        (model, {**FAST, "method": "gptq"}, "quantize method rtn, and this run has gptq"),
        (model, {**FAST, "samples": 3}, "calibration samples 4, and this run has 3"),
        (model, {**FAST, "preset": "best"}, "passes allocate, quantize, and this run has allocate, "),
        (other, FAST, "model model, and this run has other"),
    ]
    for source, settings, words in cases:
        with pytest.raises(UsageError) as caught:
            quantize(source, tmp_path / "out", True, **settings)
        message = str(caught.value)
        assert message.startswith(f"{kept} was begun with {words}")
        remedy = "; --resume needs the same settings, so pass those, or --force without --resume to start anew."
        assert message.endswith(remedy)
        assert files_of(kept) == before


def test_a_model_that_was_written_again_is_another(kept: Path, model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    try:
        with pytest.raises(
            UsageError, match=r"was begun with file model.safetensors \d+ bytes, written 20.* UTC, and this run"
        ):
            quantize(model, tmp_path / "out", True, **FAST)
    finally:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_another_text_is_told_from_its_tokens(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text((model / "text.txt").read_text())
    run = partial(quantize, model, tmp_path / "out", True, bits=4, group_size=16, calib=str(text))
    interrupt(monkeypatch, run, BLOCK.format(2))
    text.write_text("w3 " + text.read_text())
    with pytest.raises(
        UsageError, match=r"was begun with calibration tokens [0-9a-f]{16}, and this run has [0-9a-f]{16};"
    ):
        run()


def test_sums_depend_on_the_number_of_threads(kept: Path, model: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(
            UsageError, match=rf"with threads \(OMP_NUM_THREADS\) {before}, and this run has {before + 1};"
        ):
            quantize(model, tmp_path / "out", True, **FAST)
    finally:
        torch.set_num_threads(before)
