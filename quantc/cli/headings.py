"""Options under headings in `--help`: a command of thirty options reads as six short lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

MEASURED = "What is measured"
SIZE = "How small"
STORAGE = "How stored"
METHOD = "How rounded"
CALIBRATION = "Calibration"
OUTPUT = "Output"
RUN = "Run"
HEADINGS = (MEASURED, SIZE, STORAGE, METHOD, CALIBRATION, OUTPUT, RUN)  # in the order of the help

LONGEST_NAME = 30  # columns for the names of options; a longer one has its text on the next line


class HeadedOption(click.Option):
    """An option that knows the heading it is listed under."""

    def __init__(self, *names: Any, heading: str = RUN, **settings: Any):
        super().__init__(*names, **settings)
        self.heading = heading


class HeadedCommand(click.Command):
    """A command whose help lists the options of each heading by themselves, in one column of names."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by heading; a command whose options have a single heading gets click's plain list."""
        listed: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                listed.setdefault(getattr(parameter, "heading", RUN), []).append(record)
        names = [name for records in listed.values() for name, _ in records if len(name) <= LONGEST_NAME]
        width = max(map(len, names), default=0)
        for heading in HEADINGS if len(listed) > 1 else listed:
            if heading in listed:
                with formatter.section(heading if len(listed) > 1 else "Options"):
                    aligned = [(name.ljust(width), text) for name, text in listed[heading]]
                    formatter.write_dl(aligned, col_max=LONGEST_NAME)


def option(*names: str, heading: str = RUN, **settings: Any) -> Decorator:
    """Return a decorator that gives a command an option under a heading."""
    return click.option(*names, cls=HeadedOption, heading=heading, **settings)


def options(*decorators: Decorator) -> Decorator:
    """Return one decorator for several options, which the help lists in this order."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply
