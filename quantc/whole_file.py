"""Files that appear whole or not at all, beside which nobody's file is touched; paths for libraries that need UTF-8."""

from __future__ import annotations

import os
import secrets
from os import fsencode
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under a name that nothing had, then give it its own; a link stays one. Raises OSError."""
    place = file.resolve()
    fresh = place.with_name(f".{place.name[:200]}.{secrets.token_hex(4)}")
    try:
        with fresh.open("xb") as stream:
            stream.write(content)
        os.replace(fresh, place)
    except FileExistsError:
        raise
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def utf8_path(folder: Path) -> Path:
    """Return a path of a folder that is UTF-8 whatever the locale; the tokenizers library takes no other.

    Where the locale's encoding is another one and the name is not ASCII, it goes through a descriptor that stays open.
    """
    text = os.fspath(folder)
    try:
        if text.encode() == fsencode(text):
            return folder
    except UnicodeEncodeError:
        pass  # bytes that the locale cannot decode
    return Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}")
