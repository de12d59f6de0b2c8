"""What the command line does with the terminal: streams, log lines, progress, JSON. Tables are in tables.py.

Results go to stdout, everything else to stderr. The functions import rich, so that `quantc --help` is fast.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from math import isfinite
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..progress import LogProgress, Progress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Without a terminal nothing wraps: a table or a sentence stays greppable.
PIPE_WIDTH = 400
SILENCE = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class SilentProgress:
    """Progress nobody watches."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, name: str) -> None: ...

    def linear(self, name: str, error: float) -> None: ...

    def note(self, text: str) -> None: ...

    def done(self) -> None: ...


@contextmanager
def session(quiet: bool = False, verbose: bool = False) -> Iterator[Progress]:
    """Keep the noise of libraries away while they work, and send log lines and progress to stderr.

    Yields the progress to hand to the api: live in a terminal, log lines elsewhere, nothing when quiet.
    """
    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        if not verbose:
            warnings.simplefilter("ignore")
        screen = make_console(to_stderr=True)
        live = screen.is_terminal and not screen.is_dumb_terminal and not quiet
        with _log_lines(screen, _level(quiet, verbose, live)):
            if not live:
                yield SilentProgress() if quiet else LogProgress()
                return
            from .live_progress import LiveProgress

            with LiveProgress(screen) as progress:
                yield progress


def make_console(to_stderr: bool = False) -> Console:
    """Return a rich console on stdout or stderr; wide when that is no terminal and COLUMNS is not set.

    Brackets in a text are not markup: names come from files.
    """
    from rich.console import Console

    stream = sys.stderr if to_stderr else sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    width = PIPE_WIDTH if wide else None
    return Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def show(*parts: RenderableType) -> None:
    """Print rich renderables on stdout; in a pipe without the blanks that fill a line."""
    screen = make_console()
    with screen.capture() as capture:
        for part in parts:
            screen.print(part, crop=False)
    lines = capture.get().splitlines()
    sys.stdout.write("".join(f"{line if screen.is_terminal else line.rstrip()}\n" for line in lines))


def show_json(value: Any) -> None:
    """Print one JSON object on stdout; figures that are not finite become null."""
    json.dump(to_plain(value), sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def to_plain(value: Any) -> Any:
    """Return nested mappings, sequences and scalars as JSON types; NaN and infinity become None."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    return str(value)


def _level(quiet: bool, verbose: bool, live: bool) -> int:
    if quiet:
        return logging.ERROR
    if verbose:
        return logging.DEBUG
    return logging.WARNING if live else logging.INFO


@contextmanager
def _log_lines(screen: Console, level: int) -> Iterator[None]:
    """Show quantc's log records on this console, above a live display if there is one."""
    logger = logging.getLogger("quantc")
    handler = _ConsoleHandler(screen)
    before, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagate


class _ConsoleHandler(logging.Handler):
    def __init__(self, screen: Console):
        super().__init__()
        self._screen = screen
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._screen.print(printable(self.format(record), keep="\n"), style=style)
