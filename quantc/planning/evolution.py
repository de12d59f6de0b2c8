"""Evolutionary search over plans that are tuples of levels: a level for every unit, more bits with every level.

One parent has many children by level-switch mutations: some units go up a level, others down until the plan is within
the budget again. Children are selected in stages, each dearer than the one before and with fewer of them left; the
last child becomes the parent only if it measures lower on the last stage. So what is found never measures worse than
what was started from. In the manner of EvoPress (Sieberling et al. 2024, arXiv:2410.14649).

Nothing here knows what a model is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

Levels = tuple[int, ...]

DRAWN = 64  # children of a generation, before the first stage
DRAWS = 8 * DRAWN  # at most, to find DRAWN that differ
MOST_RAISED = 3  # units that go up at once; few of them most of the time


@dataclass(frozen=True)
class Stage:
    """A step of the selection. measure: what each of some plans loses; survivors: how many of them are kept."""

    measure: Callable[[Sequence[Levels]], list[float]]
    survivors: int


@dataclass(frozen=True)
class Problem:
    """start: where the search begins. counts: how many levels each unit has. fits: whether a plan is within budget.

    stages: the last one decides, and leaves one survivor. seed: the same one gives the same search.
    """

    start: Levels
    counts: Levels
    fits: Callable[[Levels], bool]
    stages: tuple[Stage, ...]
    seed: str


@dataclass(frozen=True)
class State:
    """How far a search has come: all that the next generation depends on.

    history: the parent after every generation with what it measured in the last stage; the first is the start.
    tried: what was measured in the last stage, and need not be again.
    """

    history: tuple[tuple[Levels, float], ...] = ()
    tried: frozenset[Levels] = frozenset()


def advance(problem: Problem, state: State) -> State:
    """Return the state one generation later; for an empty one, the state with the start measured."""
    last = problem.stages[-1]
    if not state.history:
        return State(((problem.start, last.measure([problem.start])[0]),), frozenset([problem.start]))
    parent, lost = state.history[-1]
    children = _children(problem, parent, state.tried, Random(f"{problem.seed} {len(state.history)}"))
    for stage in problem.stages[:-1]:
        children = [child for child, _ in _best(stage, children)]
    tried = state.tried | set(children)
    for child, found in _best(last, children):
        if found < lost:
            parent, lost = child, found
    return State((*state.history, (parent, lost)), tried)


def _best(stage: Stage, plans: list[Levels]) -> list[tuple[Levels, float]]:
    if not plans:
        return []
    return sorted(zip(plans, stage.measure(plans), strict=True), key=lambda pair: pair[1])[: stage.survivors]


def _children(problem: Problem, parent: Levels, tried: frozenset[Levels], random: Random) -> list[Levels]:
    """Return DRAWN different children, or as many as were found."""
    found: dict[Levels, None] = {}
    for _ in range(DRAWS):
        child = _mutate(problem, parent, random)
        if child is not None and child not in tried:
            found[child] = None
        if len(found) == DRAWN:
            break
    return list(found)


def _mutate(problem: Problem, parent: Levels, random: Random) -> Levels | None:
    """Return the plan with some units a level up and others down to fit the budget; None where that is not enough."""
    raisable = [unit for unit, level in enumerate(parent) if level + 1 < problem.counts[unit]]
    wanted = min(random.randint(1, MOST_RAISED), random.randint(1, MOST_RAISED), len(raisable))
    raised = random.sample(raisable, wanted)
    lowerable = [unit for unit, level in enumerate(parent) if level > 0 and unit not in raised]
    random.shuffle(lowerable)
    child, lowered = _moved(parent, raised, 1), []
    while raised and lowerable and not problem.fits(child):
        lowered.append(lowerable.pop())
        child = _moved(child, lowered[-1:], -1)
    for unit in lowered[:-1]:  # a large one that came later may have made enough room alone
        if problem.fits(restored := _moved(child, [unit], 1)):
            child = restored
    return child if raised and problem.fits(child) else None


def _moved(levels: Levels, units: list[int], by: int) -> Levels:
    return tuple(level + by * (unit in units) for unit, level in enumerate(levels))
