"""What can be made again, kept on disk by key. Whatever is wrong with the folder or a file: the answer is "not there".

PARTs are subfolders: cuda for compiled kernels, losses for tables of losses, search for how far searches came.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from .whole_file import write_whole

log = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size


def folder(part: str) -> Path:
    """Return the folder `part` of the cache: in $QUANTC_CACHE, else in quantc/ of $XDG_CACHE_HOME or ~/.cache."""
    own, shared = os.environ.get("QUANTC_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "quantc"
    return base / part


def load(part: str, key: str) -> bytes | None:
    """Return what was stored under a key; None if nothing was, or if it cannot be read or its checksum is wrong."""
    try:
        data = (folder(part) / key).read_bytes()
    except OSError:
        return None
    digest, content = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def store(part: str, key: str, content: bytes) -> None:
    """Keep content under a key. The file appears whole, so other processes may read and write the same key."""
    try:
        folder(part).mkdir(parents=True, exist_ok=True)
        write_whole(folder(part) / key, hashlib.sha256(content).digest() + content)
    except OSError as error:
        log.debug("%s is not kept in %s: %s", key, folder(part), error)
