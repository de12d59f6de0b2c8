"""Files that appear whole or not at all, beside which nobody's file is touched."""

from __future__ import annotations

import os
import secrets
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
