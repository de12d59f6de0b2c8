"""Types of option values: whole numbers, shares, words; bad ones are refused in one sentence that names the option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

LARGEST = 2**63 - 1  # what torch and the sizes of Python's own sequences go to


class Whole(click.ParamType):
    """A whole number in a range; anything else is refused in one sentence that names the option."""

    name = "n"

    def __init__(self, low: int, high: int | None = None):
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            number = self.low - 1
        if self.low <= number <= (LARGEST if self.high is None else self.high):
            return number
        needed = f"from {self.low} to {self.high}" if self.high is not None else f"of {self.low} or more"
        raise click.UsageError(f"{_option(param)} is {value}; it must be a whole number {needed}.", ctx)


class WholeOr(Whole):
    """One of some words, or a whole number in a range."""

    def __init__(self, low: int, high: int, *words: str):
        super().__init__(low, high)
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in self.words else super().convert(value, param, ctx)


class Number(click.ParamType):
    """A number in a range; a whole one is an int. Anything else is refused in one sentence that names the option."""

    name = "x"

    def __init__(self, low: float, high: float):
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = as_number(value)
        if self.low <= number <= self.high:
            return int(number) if number == int(number) else number
        raise click.UsageError(
            f"{_option(param)} is {value}; it must be a number from {self.low:g} to {self.high:g}.", ctx
        )


class NumberOr(Number):
    """One of some words, or a number in a range."""

    def __init__(self, low: float, high: float, *words: str):
        super().__init__(low, high)
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in self.words else super().convert(value, param, ctx)


class Above(click.ParamType):
    """A number above a limit."""

    name = "x"

    def __init__(self, low: float):
        self.low = low

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = as_number(value)
        if number > self.low and number != float("inf"):
            return number
        raise click.UsageError(f"{_option(param)} is {value}; it must be a number above {self.low:g}.", ctx)


class Share(click.ParamType):
    """A percentage, with its sign; as a share, so that 2% is 0.02."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = as_number(str(value).removesuffix("%"))
        if str(value).endswith("%") and 0 < number < float("inf"):
            return number / 100
        raise click.UsageError(f"{_option(param)} is {value}; it must be a percentage above 0, such as 2%.", ctx)


def as_number(value: Any) -> float:
    """Return a number, or NaN for what is none."""
    try:
        return float(value)
    except ValueError:
        return float("nan")


def _option(param: click.Parameter | None) -> str:
    return max(param.opts, key=len) if param else "the value"


class Pin(click.ParamType):
    """NAMES=BITS: a pattern of names, and a number of bits."""

    name = "names=bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        pattern, _, bits = str(value).rpartition("=")
        if not pattern or not bits.isdecimal() or len(bits) > 2:
            raise click.UsageError(f"--pin is {value}; it must be NAMES=BITS, such as '*.down_proj=4'.", ctx)
        return pattern, int(bits)


class Words(click.ParamType):
    """Words between commas."""

    name = "words"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return tuple(word.strip() for word in str(value).split(",") if word.strip())


def as_mapping(ctx: click.Context, param: click.Parameter, value: tuple[tuple[str, int], ...]) -> dict[str, int] | None:
    """Return the pairs of a repeated option as a mapping, None where there are none; a callback of click."""
    return dict(value) or None


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that gives these settings; None is one that was not given."""
    words: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "symmetric" and value is not None:
            words.append("--symmetric" if value else "--asymmetric")
        elif isinstance(value, dict):
            words += [word for key, item in value.items() for word in (flag.removesuffix("s"), f"{key}={item}")]
        elif value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return words
