"""Files that appear whole or not at all, beside which nobody's file is touched; paths for libraries that need UTF-8."""

from __future__ import annotations

import json
import os
import secrets
from os import fsencode
from pathlib import Path
from typing import Any


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


def json_text(content: Any, **layout: Any) -> str:
    """Return JSON in which names of files are text, whatever the locale: bytes that it cannot decode are read as UTF-8.

    Python has such bytes as halves of characters, which no other reader of JSON takes. layout: keywords of json.dumps.
    """
    text = json.dumps(content, **layout)
    if "\\ud" not in text:
        return text
    whole = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return json.dumps(json.loads(whole), **layout)


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
