"""Live progress, JSON values, and figures as text."""

import io
import logging
import re
from typing import Any

import pytest
from rich.console import Console

from quantc.cli.console import session, to_plain
from quantc.cli.live_progress import LiveProgress
from quantc.errors import ModelError
from quantc.units import clock, duration, number, size


def test_live_progress_shows_stage_steps_linear_times_and_memory() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    with LiveProgress(screen) as progress:
        progress.stage("Quantizing", 4)
        progress.linear("model.layers.0.mlp.up_proj", 0.01234)
        progress.step("model.layers.0")
        progress.linear("model.layers.1.mlp.up_proj", 0.02468)
        with screen.capture() as capture:
            screen.print(progress)
    shown = capture.get()
    assert "✓ opening the model" in shown
    assert re.search(r"Quantizing .* 1/4 0:00 elapsed  0:00 left [\d.]+ [MG]B memory", shown)
    assert "model.layers.1.mlp.up_proj   error 0.0247" in shown


def test_live_progress_ends_cleanly_when_the_run_fails() -> None:
    stream = io.StringIO()
    with (
        pytest.raises(ModelError),
        LiveProgress(Console(file=stream, force_terminal=True, width=90)) as progress,
    ):
        progress.stage("Quantizing", 4)
        raise ModelError("no")
    assert stream.getvalue().endswith("\x1b[?25h\n")  # the cursor is shown again
    assert "4/4" not in stream.getvalue()


def test_names_command_no_terminal() -> None:
    stream = io.StringIO()
    screen = Console(file=stream, force_terminal=True, width=110, color_system=None)
    with LiveProgress(screen) as progress:
        progress.stage("[/x]\x1b[5m", 4)
        progress.step("[/y]\x1b[5m")
        progress.note("[/z]\x1b[5m")
        with screen.capture() as capture:
            screen.print(progress)
    assert "[/x]\\x1b[5m" in capture.get()
    assert "[/y]\\x1b[5m" in capture.get()
    assert "[/z]\\x1b[5m" in stream.getvalue()
    assert "\x1b[5m" not in stream.getvalue()


def test_log_lines_command_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with session():
        logging.getLogger("quantc").warning("%s done\nsecond line", "[/x] :smile: \x1b[5m")
    assert "[/x] :smile: \\x1b[5m done\nsecond line" in capsys.readouterr().err


def test_json_values_are_plain(tmp_path: Any) -> None:
    value = {"a": float("nan"), "b": (1, float("-inf")), "c": tmp_path, 4: True}
    assert to_plain(value) == {"a": None, "b": [1, None], "c": str(tmp_path), "4": True}


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (size(float("inf")), "n/a TB"), (duration(float("inf")), "n/a"), (duration(float("nan")), "n/a"),
        (size(999), "999 B"), (size(112_345_678), "112 MB"), (size(1_999_999), "2.00 MB"),
        (size(25.3e9), "25.3 GB"), (duration(4.25), "4.2 s"),
        (duration(59.99), "1 min 00 s"), (duration(7620), "2 h 07 min"),
        (clock(185), "3:05"), (clock(7620), "2:07:00"),
        (number(4.15625, 4), "4.156"), (number(0.00123456), "0.00123"), (number(123456.0), "123456"),
        (number(1.5e-9), "1.50e-09"), (number(0), "0"), (number(float("nan")), "n/a"), (number(None), "n/a"),
    ],
)  # fmt: skip
def test_figures_read_well(shown: str, wanted: str) -> None:
    assert shown == wanted
