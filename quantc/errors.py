"""Every error a user can meet: one sentence with what was found, what is needed, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST_MESSAGE = 2000  # characters: a message may quote a value from a file, and that can have megabytes


def printable(text: str, keep: str = "") -> str:
    """Return text with characters that a terminal would obey (escapes, changes of direction) as \\x1b and the like."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def as_option(setting: str) -> str:
    """Return a setting's name as the command line writes it: `avg_bits` is --avg-bits."""
    return f"--{setting.replace('_', '-')}"


def one_line(text: str) -> str:
    """Return a message as one line that is safe to print, its middle left out where it is very long."""
    line = printable(" ".join(text.split()))
    if len(line) <= LONGEST_MESSAGE:
        return line
    half = LONGEST_MESSAGE // 2
    return f"{line[:half]} [...] {line[-half:]}"


class QuantcError(Exception):
    """Base of all errors quantc raises on purpose: one printable line, which the command line shows as it is."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(one_line(message))


class UsageError(QuantcError):
    """An option, recipe key or plan entry is unknown, contradictory or out of range."""

    exit_code = 2


class ModelError(QuantcError):
    """The source model cannot be read, or is not something quantc can quantize."""


class CalibrationError(QuantcError):
    """The calibration data is missing, too short, or drives the model to non-finite values."""


class CheckpointError(QuantcError):
    """A quantc checkpoint is damaged, incomplete, of an unknown version, or cannot be written."""


class PassError(QuantcError):
    """Passes are in an order that cannot work."""


class KernelError(QuantcError):
    """A compiled kernel cannot be built, loaded or started on this machine."""


@contextmanager
def in_one_sentence(describe: Callable[[Exception], QuantcError]) -> Iterator[None]:
    """Raise what `describe` makes of another library's error; quantc's own and those for want of memory stay."""
    try:
        yield
    except (QuantcError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise describe(error) from error
