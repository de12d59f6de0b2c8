"""What an interrupted run leaves for the next one: one JSON file in its folder, replaced whole after every step.

It says what decides the bytes of the run (its identity), what was finished, and all that is needed to go on from there
besides the tensors, which are stored beside it. It carries a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.untrusted import read_json
from ..files.whole_file import json_text

JOURNAL = "resume.json"
VERSION = 2  # the first one had no checksum
ANEW = "pass --force without --resume to start anew"


class DamagedRun(CheckpointError):
    """What an interrupted run left is not what it wrote."""


@dataclass(frozen=True)
class Journal:
    """identity: nested mappings of names to values. done: what is finished, in words; "" for nothing.

    state: what else there is to know, as a JSON value.
    """

    identity: dict[str, Any]
    done: str
    state: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Replace the journal in the folder atomically; raises OSError."""
        fresh = folder / (JOURNAL + ".new")
        with open(fresh, "w", encoding="utf-8", opener=open_own) as stream:
            stream.write(json_text({"version": VERSION, "sha256": self.checksum(), **vars(self)}))
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(folder / JOURNAL)

    def checksum(self) -> str:
        """Return the sha256 of what the journal says."""
        return hashlib.sha256(json_text(vars(self), sort_keys=True).encode()).hexdigest()

    def check(self, recorded: object) -> None:
        """Raise ValueError where this is no journal that a run wrote; recorded: its checksum."""
        if not (isinstance(self.identity, dict) and isinstance(self.done, str) and isinstance(self.state, dict)):
            raise ValueError("identity, done and state are a mapping, words and a mapping")
        if not self.done.isprintable():
            raise ValueError("what is done is said in one line")
        if recorded != self.checksum():
            raise ValueError("it has another checksum than it says")


def open_own(file: str, flags: int) -> int:
    """Open a regular file, never through a link; for the `opener` of `open`. Raises OSError."""
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{file} is not a regular file")
    return descriptor


def read_journal(folder: Path) -> Journal | None:
    """Return the journal in a folder, None where there is none; raises DamagedRun for one that cannot be used."""
    file = folder / JOURNAL
    if not os.path.lexists(file):
        return None
    try:
        if file.is_symlink():
            raise ValueError("it is a symbolic link")
        content = read_json(file)
        version, recorded = content.pop("version"), content.pop("sha256", None)
        if version != VERSION:
            raise ValueError(f"it has version {_shown(version)}, not {VERSION}")
        journal = Journal(**content)
        journal.check(recorded)
        return journal
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRun(f"{file} cannot be read ({error}); {ANEW}.") from error


def _with_journal(folder: Path) -> list[Path]:
    """Return the folder and those in it that a quality target builds in, where these have a journal."""
    return [place for place in (folder, *sorted(folder.glob("build-*"))) if os.path.lexists(place / JOURNAL)]


def has_journal(folder: Path) -> bool:
    """Return whether a run left one, in the folder or in one inside it: a quality target builds there."""
    return bool(_with_journal(folder))


def kept_in(folder: Path, damaged: str = "") -> str:
    """Return what interrupted runs in a folder had finished, in words; "" for nothing.

    damaged: what to say of a journal that cannot be read, which another version of quantc may have written.
    """
    for place in _with_journal(folder):
        try:
            journal = read_journal(place)
        except DamagedRun:
            if damaged:
                return damaged
            continue
        if journal is not None and journal.done:
            return journal.done
    return ""


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the first thing in which two identities differ, in words; "" where they are the same."""
    old, new = dict(_leaves(before)), dict(_leaves(json.loads(json_text(now))))
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            return f"{name} {_shown(old.get(name))}, and this run has {_shown(new.get(name))}"
    return ""


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{name} {key}".strip())


def _shown(value: Any) -> str:
    """Return a value as one line, with nothing that a terminal would obey."""
    return "none" if value is None else value if isinstance(value, str) and value.isprintable() else json.dumps(value)
