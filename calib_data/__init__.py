"""Calibration text: what is built in, and how files and hub data sets are read.

`text/*.txt` was written for this project, one file per genre. A quantizer sees the statistics of whatever it
is calibrated on, so the built-in text is kept varied: prose, dialogue, code, mathematics, tables, expository
text, letters, chat, and fourteen languages besides English.

To add a genre, put another file into `text/`; its documents are separated by `<|endofdocument|>` lines.
To add a hub data set, add one line to `HUB_DATASETS` in sources.py.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from ..errors import UsageError
from .builtin import load_builtin
from .chat import Conversation, Document
from .sources import FILE_READERS, HUB_DATASETS, load_file, load_hub

__all__ = ["SOURCE_NAMES", "Conversation", "Document", "load_documents"]

SOURCE_NAMES = ("builtin", *HUB_DATASETS)


def load_documents(source: str, *, also_known: Sequence[str] = (), notes: list[str] | None = None) -> list[Document]:
    """Return the non-empty documents of a calibration source, in an order that never changes.

    source: "builtin", a name from `HUB_DATASETS`, or the path of a .txt, .jsonl or .parquet file. A file is
        read whole, so memory holds all of its text.
    notes: gets a sentence where rows of a file say nothing and were skipped.
    also_known: names the caller handles without this function; they are offered when `source` is misspelt.

    Raises UsageError for an unknown source, CalibrationError for one that cannot be read or holds no text.
    """
    if source == "builtin":
        return list(load_builtin())
    if source in HUB_DATASETS:
        return load_hub(source)
    if _names_a_file(source):
        return load_file(Path(source), notes)
    raise UsageError(_unknown_source(source, [*SOURCE_NAMES, *also_known]))


def _names_a_file(source: str) -> bool:
    return Path(source).suffix.lower() in FILE_READERS or os.path.isfile(source)


def _unknown_source(source: str, names: list[str]) -> str:
    nearest = get_close_matches(source.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "pass one of those."
    endings = ", ".join(FILE_READERS)
    return (
        f"calibration source {source!r} is neither a known name nor a file: "
        f"known are {', '.join(names)} and files ending in {endings}; {hint}"
    )
