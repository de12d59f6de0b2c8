"""Times of calls that take turns, and how many threads torch has meanwhile."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from quantc.machine.timing import at_most_threads, best_in_turns


def test_calls_take_turns_and_the_least_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 2)
    calls = {"a": [lambda: order.append("a0"), lambda: order.append("a1")], "b": [lambda: order.append("b")]}
    best = best_in_turns(calls, 0.0, rounds=2)
    assert order == ["a0", "a1", "a0", "b", "b", "b", "a1", "a0", "a1", "b", "b", "b"]
    assert best == {"a": 0.5, "b": 0.5}


def test_rounds_go_on_for_the_seconds_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))

    def call() -> None:
        nonlocal count
        count += 1
        for _ in range(10 - count if count < 5 else 6):
            next(clock)

    assert best_in_turns({"a": [call]}, 100.0, rounds=1, in_a_row=1) == {"a": 7.0}
    assert count > 5


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with at_most_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        with at_most_threads(2):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
