"""Whole numbers in specs: what counts as one, how large it may be, and how many bytes packed codes take."""

from __future__ import annotations

from math import ceil

from ..errors import UsageError

SCALE_BITS = 16
LARGEST_COUNT = 2**31 - 1  # of a group, a rank, a rotation or rows: no weight has as many rows or columns


def is_count(value: object) -> bool:
    """Return whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_size(name: str, value: object) -> None:
    """Raise UsageError for a whole number that no dimension of a weight reaches."""
    if isinstance(value, int) and value > LARGEST_COUNT:
        raise UsageError(f"{name} is {value}, but {LARGEST_COUNT} at most is possible; lower it.")


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` codes of `bits` bits in one packed row."""
    return ceil(count * bits / 8)
