"""What a run tells whoever watches it. The command line draws it; everybody else gets log lines."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger("quantc")
MOST_LINES = 128  # of a stage with a line for every step; models have fewer blocks than that, but more layers
FEW_LINES = 16


class Progress(Protocol):
    """Receives the stages of a run, in order; a stage has `total` steps, and linears report inside a step."""

    def stage(self, name: str, total: int) -> None: ...

    def step(self, name: str) -> None: ...

    def linear(self, name: str, error: float) -> None: ...

    def note(self, text: str) -> None:
        """Tell whoever watches a sentence, between the steps."""

    def done(self) -> None: ...


class LogProgress:
    """Progress as log lines: one per step at a level, INFO by default, and one per linear at DEBUG.

    Of a stage with many steps only a few are at the level, evenly spaced, and the others at DEBUG.
    """

    def __init__(self, level: int = logging.INFO) -> None:
        self._level = level
        self._name, self._total, self._count = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        self._name, self._total, self._count = name, total, 0

    def step(self, name: str) -> None:
        self._count += 1
        shown = self._total <= MOST_LINES or self._count * FEW_LINES % self._total < FEW_LINES
        log.log(self._level if shown else logging.DEBUG, "%s %d/%d %s", self._name, self._count, self._total, name)

    def linear(self, name: str, error: float) -> None:
        log.debug("%s error %.3g", name, error)

    def note(self, text: str) -> None:
        log.log(self._level, "%s", text)

    def done(self) -> None:
        log.log(self._level, "%s done", self._name)
