"""How much memory this process has used, and giving free memory back."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from typing import Any


def peak_rss_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Hand memory that is free inside this process back to the system, where the C library can.

    glibc keeps freed tensors of up to 32 MB for later, among those that stay: over the blocks of a model of two
    billion parameters that grew to a gigabyte. Costs about 30 ms.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's function of that name, or None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
