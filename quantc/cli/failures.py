"""How the command line treats what goes wrong: one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import click

from ..errors import QuantcError, one_line
from ..files import disk_cache
from .headings import HeadedCommand

INTERRUPTED = 130  # what shells return for a process that SIGINT ended
BUG = 70  # EX_SOFTWARE of sysexits.h
CRASHES = "crashes"  # subfolder of the cache


class Commands(click.Group):
    """The group of all commands. Exit codes: 2 for wrong usage, 130 when interrupted, 70 for a bug, 1 for the rest."""

    command_class = HeadedCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of definition, which is that of use

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = get_close_matches(name, self.commands, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self.commands)}."
            raise click.UsageError(f"no such command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command and exit; report a failure in one line, which for a bug names the file of its traceback."""
        _never_fail_to_encode()
        try:
            with _terminated_as_interrupted():
                code = super().main(*args, **{**extra, "standalone_mode": False})
                sys.stdout.flush()
        except BrokenPipeError:  # whoever read our output has read enough
            _discard_output()
            code = 1
        except Exception as error:
            message, code = describe_failure(error)
            click.echo(" ".join([f"Error: {message}", *_notes_on(error)]), err=True)
        sys.exit(code if isinstance(code, int) else 0)


def describe_failure(error: Exception) -> tuple[str, int]:
    """Return one line and an exit code for an error; a bug's traceback is written into a file that the line names."""
    if isinstance(error, click.Abort):
        return "interrupted.", INTERRUPTED
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "quantc"
        return f"{_describe_usage(error)} See `{command} --help`.", error.exit_code
    if isinstance(error, click.ClickException):
        return one_line(error.format_message()), error.exit_code
    if isinstance(error, QuantcError):
        return one_line(str(error)), error.exit_code
    if isinstance(error, OSError):
        return _describe_os_error(error), 1
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return "out of memory; free some, or pass fewer --samples or a shorter --seq-len or --context.", 1
    return _describe_bug(error), BUG


def _describe_bug(error: Exception) -> str:
    """Return a bug's kind and where its traceback is; a full or read-only disk is no reason to say nothing."""
    kind = one_line(f"{type(error).__name__}: {error}")
    report = "".join(traceback.format_exception(error))
    for folder in (disk_cache.folder(CRASHES), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, file = tempfile.mkstemp(prefix=time.strftime("quantc-%Y%m%d-"), suffix=".txt", dir=folder)
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(f"{sys.argv}\n{report}")
        except OSError:
            continue
        return f"this is a bug in quantc ({kind}); its traceback is in {file}, please report it."
    return f"this is a bug in quantc ({kind}), and no file could be written for its traceback; please report it."


def _never_fail_to_encode() -> None:
    """Show what a terminal's encoding lacks, and names of files that are no text, as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Send what is still in the buffer of stdout nowhere, or Python complains about it at its end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stdout that is no file needs none of this
        return


def _notes_on(error: BaseException) -> list[str]:
    """Return the notes added to an error on its way; click's own Abort has an interrupt as its cause."""
    cause = error.__cause__ if isinstance(error, click.Abort) else error
    return [one_line(note) for note in getattr(cause, "__notes__", ())]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, which schedulers send before they kill, end a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe_usage(error: click.UsageError) -> str:
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        return f"No such option {error.option_name}; did you mean {error.possibilities[0]}?"
    return one_line(error.format_message())


def _describe_os_error(error: OSError) -> str:
    reason = one_line(error.strerror or str(error))
    place = f": {one_line(str(error.filename))}" if error.filename else ""
    remedy = "; free some space or choose another output" if error.errno == errno.ENOSPC else ""
    return f"{reason}{place}{remedy}."


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; torch raises RuntimeErrors of several kinds for it."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))
