"""How much memory this process has used and may yet use, and giving free memory back."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

RELEASE_BYTES = 64 << 20
# glibc's mallopt(3): its own limits move with use, which costs a small model 6 GB of page faults in a run.
TRIM_THRESHOLD, MMAP_THRESHOLD = (-1, 256 << 20), (-3, 32 << 20)
# transformers loads in threads that end with the block, and each may get an arena of its own, whose gaps the next ones
# do not fill: a process that quantized stories15M again and again grew by 7 MB a run, and with one arena it does not.
ARENAS = (-8, 1)
# Where a container is told how much memory it may use (cgroup v2): files of one number, or "max".
LIMITS = Path("/sys/fs/cgroup")


def peak_rss_bytes() -> int:
    """Return the most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Return the memory free for this process: the machine's, or what its container has left if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((LIMITS / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (LIMITS / "memory.stat").read_text(encoding="utf-8").splitlines())
        # Files that were read count as used, and are given up where memory is needed.
        return max(0, min(free, int(limit) - int(used) + int(facts["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no container, none with a limit, or one of another kind
        return free


class FreeMemory:
    """Hands memory that is free inside this process back to the system, where the C library can.

    glibc keeps freed tensors of up to 32 MB for later, among those that stay: over the blocks of a model of two
    billion parameters that grew to a gigabyte. Handing back costs about 30 ms and every page is fetched anew (a
    tenth of a small model's CPU time when done at every step), so it waits until RELEASE_BYTES came together.
    """

    def __init__(self) -> None:
        self._used = 0
        set_limit = _libc("mallopt")
        for limit in (TRIM_THRESHOLD, MMAP_THRESHOLD, ARENAS) if set_limit is not None else ():
            set_limit(*limit)

    def release(self, used: int) -> None:
        """Hand memory back once enough was freed; used: bytes of the tensors that were just worked on."""
        self._used += used
        trim = _libc("malloc_trim")
        if trim is not None and self._used >= RELEASE_BYTES:
            trim(0)
            self._used = 0


@cache
def _libc(function: str) -> Any:
    """Return glibc's function of that name, or None with another C library."""
    try:
        return getattr(ctypes.CDLL(None), function)
    except (AttributeError, OSError, TypeError):
        return None
