"""Log lines in place of a live display."""

from __future__ import annotations

import logging

import pytest

from quantc.progress import FEW_LINES, LogProgress


@pytest.mark.parametrize(("total", "lines"), [(30, 30), (128, 128), (210, FEW_LINES), (5000, FEW_LINES)])
def test_a_stage_of_many_steps_has_few_lines(total: int, lines: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantc")
    progress = LogProgress()
    progress.stage("Writing", total)
    for number in range(total):
        progress.step(f"layer {number}")
    assert len(caplog.messages) == lines
    assert caplog.messages[-1] == f"Writing {total}/{total} layer {total - 1}"
