"""The solver's plan refined by search: what is rounded, measured, and kept on disk after every generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import disk_cache
from ..pipeline.fingerprint import key_of
from ..pipeline.run import Run, load_outside
from ..units import number
from .budget import Budget, Shared
from .evolution import Levels, Problem, Stage, State, advance
from .meter import Meter
from .neighbours import Neighbours
from .rounded_weights import RoundedWeights, round_all

CACHE = "search"  # the part of the disk cache
FORMAT = 1  # of an entry; also raised when the search finds something else
# Samples of the calibration set, at most a quarter, on which plans are measured. Differences of plans vary between
# samples: on stories15M 10 generations took 4 % off the divergence of 8 samples, and 0.4 +- 0.6 % off that of others.
MEASURED = 16
FEW = 4  # one of this many samples is for the first selection
OFFSPRING, SURVIVORS = 16, 4  # of a generation: measured on few samples, and on all


@dataclass(frozen=True)
class Refined:
    """A plan, what it measures and what the solver's measured, in nats per token, on how many tokens."""

    plan: Shared
    found: float
    before: float
    tokens: int

    @property
    def note(self) -> str:
        """The note for the report."""
        return (
            f"search: KL divergence {number(self.found)} measured, {number(self.before)} of the plan it started from, "
            f"on {self.tokens:,} tokens"
        )


def refine(
    run: Run,
    tokens: torch.Tensor,
    folder: Path,
    budget: Budget,
    plan: Shared,
    fits: Callable[[Shared], bool],
    generations: int,
    **question: Any,
) -> Refined:
    """Return the plan of lowest measured KL divergence that the search finds near the solver's, or that one itself.

    tokens: the calibration set (samples, T); what is measured on guides no rounding, if there are four samples or
    more. folder: for temporary files. fits: whether a plan is within the budget. question: what the search depends on
    besides the model, the tokens and the options near the plan, as JSON values.
    """
    near = Neighbours(budget, plan)
    key = key_of(run, tokens, search=FORMAT, start=near.start, options=near.facts(), **question)
    guides, measured = split(tokens)
    state = _decode(disk_cache.load(CACHE, key))
    if len(state.history) <= generations:
        with _meters(run, near, guides, measured, folder) as meters:
            problem = Problem(near.start, near.counts, lambda at: fits(near.plan(at)), _stages(near, meters), key)
            state = _search(run, problem, state, generations, key)
    (_, before), (levels, found) = state.history[0], state.history[generations]
    assert found <= before
    return Refined(near.plan(levels), found, before, measured.numel())


def split(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split calibration samples (S, T) into those that guide rounding and those to measure on, spread evenly.

    Where there are fewer than four samples, all of them do both.
    """
    count = min(MEASURED, len(tokens) // 4)
    if not count:
        return tokens, tokens
    aside = torch.zeros(len(tokens), dtype=torch.bool)
    aside[(torch.arange(count) * 2 + 1) * len(tokens) // (2 * count)] = True
    return tokens[~aside], tokens[aside]


@contextmanager
def _meters(
    run: Run, near: Neighbours, guides: torch.Tensor, measured: torch.Tensor, folder: Path
) -> Iterator[list[Meter]]:
    """Yield meters on few samples, where there are enough, and on all; with the weights rounded in all ways."""
    sets = [measured[::FEW], measured] if len(measured) >= FEW else [measured]
    load_outside(run)
    with ExitStack() as files:
        rounded = files.enter_context(closing(RoundedWeights(folder)))
        meters = [files.enter_context(closing(Meter(run, samples, rounded, folder))) for samples in sets]
        round_all(run, guides, near.candidates(), rounded, folder)
        yield meters


def _stages(near: Neighbours, meters: list[Meter]) -> tuple[Stage, ...]:
    """Return the stages of selection: by predictions first, which cost nothing, then by each meter."""

    def measured(meter: Meter) -> Callable[[Sequence[Levels]], list[float]]:
        return lambda plans: meter.measure([near.plan(levels).specs for levels in plans])

    def predicted(plans: Sequence[Levels]) -> list[float]:
        return [near.plan(levels).loss for levels in plans]

    kept = [OFFSPRING, SURVIVORS][-len(meters) :]
    measures = [predicted, *(measured(meter) for meter in meters)]
    return tuple(Stage(measure, survivors) for measure, survivors in zip(measures, [*kept, 1], strict=True))


def _search(run: Run, problem: Problem, state: State, generations: int, key: str) -> State:
    run.progress.stage("Search", generations + 1 - len(state.history))
    while len(state.history) <= generations:
        state = advance(problem, state)
        disk_cache.store(CACHE, key, _encode(state))
        run.progress.step(f"KL {number(state.history[-1][1])}")
    run.progress.done()
    return state


def _encode(state: State) -> bytes:
    return json.dumps({"history": state.history, "tried": sorted(state.tried)}).encode()


def _decode(content: bytes | None) -> State:
    if content is None:
        return State()
    found = json.loads(content)
    return State(
        tuple((tuple(levels), lost) for levels, lost in found["history"]),
        frozenset(tuple(levels) for levels in found["tried"]),
    )
