"""What an interrupted run leaves for the next one: one JSON file in its folder, replaced whole after every step.

It says what decides the bytes of the run (its identity), what was finished, and all that is needed to go on from there
besides the tensors, which lie beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .untrusted import read_json

JOURNAL = "resume.json"
VERSION = 1
ANEW = "pass --force without --resume to start anew"


class DamagedRun(CheckpointError):
    """What an interrupted run left is not what it wrote."""


@dataclass(frozen=True)
class Journal:
    """identity: nested mappings of names to values. done: what is finished, in words; "" for nothing.

    state: what else there is to know, as JSON has it.
    """

    identity: dict[str, Any]
    done: str
    state: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Take the place of the journal that was there, at once; raises OSError."""
        fresh = folder / (JOURNAL + ".new")
        with fresh.open("w", encoding="utf-8") as stream:
            json.dump({"version": VERSION, **asdict(self)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(folder / JOURNAL)


def read_journal(folder: Path) -> Journal | None:
    """The journal in a folder, None where there is none; raises DamagedRun for one that cannot be used."""
    file = folder / JOURNAL
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        version = content.pop("version")
        if version != VERSION:
            raise ValueError(f"it has version {version!r}, not {VERSION}")
        return Journal(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRun(f"{file} cannot be read ({error}); {ANEW}.") from error


def has_journal(folder: Path) -> bool:
    """Whether a run left one, in the folder or in one inside it: a quality target builds there."""
    return any(folder.rglob(JOURNAL))


def kept_in(folder: Path) -> str:
    """What interrupted runs in a folder had finished, in words; "" for nothing that can be used."""
    for file in sorted(folder.rglob(JOURNAL)):
        try:
            journal = read_journal(file.parent)
        except DamagedRun:
            continue
        if journal is not None and journal.done:
            return journal.done
    return ""


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first thing in which two identities differ, in words; "" where they are the same."""
    old, new = dict(_leaves(before)), dict(_leaves(json.loads(json.dumps(now))))
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
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
