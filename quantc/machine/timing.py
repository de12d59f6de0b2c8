"""Times calls beside each other: in turns, so that whatever else the machine does meets all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch


def best_in_turns(
    calls: Mapping[str, Sequence[Callable[[], object]]], seconds: float, rounds: int = 3, in_a_row: int = 3
) -> dict[str, float]:
    """Return the least seconds that one call of each name took, over at least `rounds` rounds and `seconds` seconds.

    calls: by name, what is called one after the other: on weights of their own, where no cache is to hold them.
    in_a_row: calls of one name before the next one's turn; the first of them finds the caches filled by others.
    """
    best, places = dict.fromkeys(calls, float("inf")), dict.fromkeys(calls, 0)
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        done += 1
        for name, alike in calls.items():
            for _ in range(in_a_row):
                call = alike[places[name] % len(alike)]
                places[name] += 1
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


@contextlib.contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """Limit torch to `count` CPU threads in an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
