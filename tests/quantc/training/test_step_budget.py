"""Pace: steps as asked for without a budget, and shares of the time that is left with one."""

from __future__ import annotations

import json

import pytest

from quantc.training import step_budget
from quantc.training.step_budget import Pace


class Clock:
    """Stands in for the time."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(step_budget, "perf_counter", clock)
    return clock


def block(made: Pace, clock: Clock, before: float, fixed: float, step: float) -> int:
    """Steps of a block that spends `before` seconds first, and then what it said."""

    def cost(steps: int) -> float:
        return fixed + steps * step

    made.begin()
    clock.now += before
    steps = made.steps(cost)
    clock.now += cost(steps)
    made.end()
    return steps


def test_without_a_budget_every_block_gets_what_was_asked_for(clock: Clock) -> None:
    made = Pace(50, None, 2)
    assert [block(made, clock, 1.0, 1.0, 10.0) for _ in range(2)] == [50, 50]
    assert made.seconds == [502.0, 502.0]


def test_a_budget_is_shared_and_never_exceeded_by_more_than_a_step_a_block(clock: Clock) -> None:
    made = Pace(50, 100.0, 4)
    assert [block(made, clock, 2.0, 3.0, 1.0) for _ in range(4)] == [20, 20, 20, 20]
    assert clock.now == 200.0


def test_what_one_block_leaves_goes_to_the_others(clock: Clock) -> None:
    made = Pace(10, 60.0, 3)
    assert block(made, clock, 0.0, 0.0, 1.0) == 10  # of 20 seconds
    assert block(made, clock, 0.0, 0.0, 5.0) == 5  # of 25
    assert block(made, clock, 0.0, 0.0, 2.5) == 10


def test_a_spent_budget_leaves_a_step_for_each_block(clock: Clock) -> None:
    made = Pace(10, 5.0, 2)
    assert [block(made, clock, 10.0, 1.0, 1.0) for _ in range(2)] == [1, 1]


def test_the_estimate_is_that_of_equal_blocks(clock: Clock) -> None:
    made = Pace(10, None, 3)
    made.begin()
    clock.now += 4.0
    made.steps(lambda steps: 1.0 + 2.0 * steps)
    assert made.estimate(lambda steps: 1.0 + 2.0 * steps) == 3 * 25.0


def test_a_pace_that_was_restored_goes_on_with_the_time_that_was_left(clock: Clock) -> None:
    made, other = Pace(50, 100.0, 4), Pace(50, 100.0, 1)
    assert block(made, clock, 2.0, 3.0, 1.0) == 20
    other.restore(json.loads(json.dumps(made.state())))
    assert [block(other, clock, 2.0, 3.0, 1.0) for _ in range(3)] == [20, 20, 20]
    assert other.seconds == [25.0] * 4
