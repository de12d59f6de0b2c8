"""Which settings hold for a module, where a config has rules by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import Pattern

from ...errors import ModelError
from .settings import Settings

EXPRESSION = "re:"  # before a regular expression


def compiled(expression: str, settings: Settings) -> Pattern[str]:
    """Return a regular expression from a config; raises ModelError for one that is none."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelError(
            f"{settings.folder}: {settings.place} has {expression!r}, which is no regular expression ({error}); use "
            "the config that belongs to the weights."
        ) from error


def name_matcher(target: str, settings: Settings) -> Callable[[str], object]:
    """Return whether a name is a target of compressed-tensors: that name, or one that an expression matches."""
    if target.startswith(EXPRESSION):
        return compiled(target.removeprefix(EXPRESSION), settings).match
    return target.__eq__


class Overrides:
    """Settings for all modules, and changes for those that a name or a regular expression matches, the first of them.

    changes: (matches, settings) in order; settings None for modules that are left in floats.
    """

    def __init__(self, settings: Settings, changes: Iterable[tuple[Callable[[str], object], Settings | None]]):
        self._settings, self._changes = settings, list(changes)

    def of(self, names: tuple[str, ...]) -> Settings:
        """Return the settings of a module with these names, by which one a rule may know it."""
        for matches, changes in self._changes:
            if any(matches(name) for name in names):
                return self._settings if changes is None else self._settings.over(changes)
        return self._settings
