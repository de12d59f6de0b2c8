"""A quality target, met by measuring: plan, build, measure, correct what was predicted, and build again.

The target is a KL divergence, or an increase of the perplexity, on held-out text. The smallest plan that is predicted
to meet it is built; what it measures says by how much predictions are off, and with that the next plan is made. Two
builds on either side of the target are a bracket, which further builds make narrower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING

import torch

from ..errors import UsageError, as_option
from ..evaluation.windows import Window, make_windows
from ..frontend.token_ids import check_ids
from ..numerics.allocation import Infeasible
from ..pipeline.run import Run
from ..planning.budget import Budget, Shared
from ..units import number

if TYPE_CHECKING:
    from ..evaluation.scores import Scores

BUILDS = 6  # at most: with 5, noisy measurements leave brackets two to four times as wide
HELD_OUT_SHARE = 8  # one of this many calibration windows is held out
HELD_OUT_WINDOWS = 32  # of a text of its own, at most
AIM = 0.9  # of the target: predictions corrected once are off by a few per cent
POWERS = (0.5, 2.0)  # of a prediction that its measurement rises by: less or more, between two builds, is noise
STRIDE = log(64)  # of the predicted loss, some 3 bits a weight: the farthest step from what was measured
EDGE = 0.15  # of a bracket: an interpolated plan is no nearer to its ends
WASTED = 0.75  # of the target: a plan that measures less than this has bits to spare
NARROW = 0.04  # of a plan's bits: another build in such a bracket saves 2 % on average
SPAN = 1e3  # measured losses count as at least the target over this, and at most the target times this
LEAST_LOSS = 1e-12  # nats per token: predictions below it count as this


@dataclass(frozen=True)
class Target:
    """The largest KL divergence in nats per token, or the largest increase of perplexity, 0.02 for 2 %."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and self.max_ppl_increase is not None:
            raise UsageError("--max-kl and --max-ppl-increase are two quality targets; remove one of them.")
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UsageError(f"{as_option(name)} is {value:g}, but a target is more than 0; 0.05 is an example.")

    @property
    def limit(self) -> float:
        """The target in the unit of `found`."""
        return self.max_kl if self.max_kl is not None else log(1 + (self.max_ppl_increase or 0.0))

    def found(self, scores: Scores) -> float:
        """Return the measured KL divergence, or the logarithm of the perplexity's increase, in nats per token."""
        if self.max_kl is not None:
            assert scores.mean_kl is not None
            return scores.mean_kl
        assert scores.perplexity_original is not None
        return log(scores.perplexity / scores.perplexity_original)

    @property
    def label(self) -> str:
        """The target as it appears in the name of a folder."""
        return f"kl{self.max_kl:g}" if self.max_kl is not None else f"ppl{100 * (self.max_ppl_increase or 0):g}"

    def describe(self, rounds: list[Round], positions: int) -> str:
        """Return a sentence on what the last of the rounds, which met the target, measured."""
        builds = f"{len(rounds)} of at most {BUILDS} builds, {positions:,} held-out predictions"
        text = f"{self._in_words(rounds[-1].found)}, at most {self._in_words(self.limit)} wanted; {builds}"
        met, missed = bracket(rounds, self.limit)
        if len(rounds) < BUILDS or met is None or missed is None or not is_wide(self.limit, met, missed):
            return text
        saved = number(100 * (met.bits - missed.bits) / met.bits, 2)
        return f"{text}; the next smaller plan that was built, of {saved} % fewer bits, missed it: one between may not"

    def refuse(self, best: float) -> UsageError:
        """Return the error for a target that no build met; best: what the best build measured."""
        return UsageError(
            f"the target cannot be met within 8 bits: {self._in_words(best)} is the best found, and at most "
            f"{self._in_words(self.limit)} is wanted; ask for that, or try --preset best."
        )

    def _in_words(self, found: float) -> str:
        if self.max_kl is not None:
            return f"a KL divergence of {number(found)}"
        return f"a perplexity {number(100 * (exp(found) - 1))} % higher"


@dataclass(frozen=True)
class Round:
    """A plan, and what its build measured."""

    shared: Shared
    found: float

    @property
    def bits(self) -> int:
        return self.shared.bits


def best_last(target: Target, rounds: list[Round]) -> list[Round]:
    """Return the builds with the smallest last that met the target; raises UsageError where none did.

    The largest plan is among those that missed then.
    """
    best, _ = bracket(rounds, target.limit)
    if best is None:
        raise target.refuse(min(item.found for item in rounds))
    return [*(item for item in rounds if item is not best), best]


def bracket(rounds: list[Round], limit: float) -> tuple[Round | None, Round | None]:
    """Return the smallest plan that met the limit, and the largest of those below it, all of which missed."""
    met = min((item for item in rounds if item.found <= limit), key=lambda item: item.bits, default=None)
    below = [item for item in rounds if met is None or item.bits < met.bits]
    return met, max(below, key=lambda item: item.bits, default=None)


def is_wide(limit: float, met: Round, missed: Round | None) -> bool:
    """Return whether a plan between the two may be worth a build: there is loss to spare, and bits to save."""
    near = missed is not None and met.bits - missed.bits <= NARROW * met.bits
    return met.found < WASTED * limit and not near


def next_plan(limit: float, budget: Budget, rounds: list[Round]) -> Shared | None:
    """Return the plan to build and measure after these, None where no other is worth it; of at most BUILDS."""
    if len(rounds) >= BUILDS:
        return None
    met, missed = bracket(rounds, limit)
    if met is not None and not is_wide(limit, met, missed):
        return None
    built = [item.shared.specs for item in rounds]
    return next((plan for plan in _offers(limit, budget, rounds, met, missed) if plan.specs not in built), None)


def _offers(
    limit: float, budget: Budget, rounds: list[Round], met: Round | None, missed: Round | None
) -> Iterator[Shared]:
    """Yield plans that may come next, the best first.

    Builds on one side of the target only are followed by others farther on, and by the outermost plan where two builds
    are left, or none between: beyond it there is nothing. A bracket is interpolated, and halved after two builds on the
    same side.
    """
    if met is not None and missed is not None:
        if (rounds[-1].found <= limit) != (rounds[-2].found <= limit):
            yield _smallest(budget, _between(limit, met, missed))
        yield budget.share((met.bits + missed.bits) // 2)
        return
    if len(rounds) < BUILDS - 2:
        yield _smallest(budget, _beyond(limit, rounds, met or missed))
    yield budget.share(budget.most if met is None else budget.least)


def _between(limit: float, met: Round, missed: Round) -> float:
    """Return the predicted loss at which a line through the logarithms of two plans reaches the target."""
    (low, found), (high, found_there) = _logs(met, limit), _logs(missed, limit)
    part = (log(AIM * limit) - found) / (found_there - found)
    return exp(low + min(max(part, EDGE), 1 - EDGE) * (high - low))


def _beyond(limit: float, rounds: list[Round], nearest: Round | None) -> float:
    """Return the predicted loss of a plan that should measure the target, where all builds are on one side of it.

    What was measured is off by a factor, which one build shows, or by a power and a factor, which two show. Steps have
    a largest length, and double from the third build on, since those before were too short.
    """
    wanted = log(AIM * limit)
    if nearest is None:
        return exp(wanted)
    predicted, found = _logs(nearest, limit)
    power = 1.0
    if len(rounds) > 1:
        other, found_there = _logs(sorted(rounds, key=lambda item: abs(item.bits - nearest.bits))[1], limit)
        power = (found_there - found) / (other - predicted) if other != predicted else 1.0
    step = (wanted - found) / min(max(power, POWERS[0]), POWERS[1]) * 2 ** max(0, len(rounds) - 2)
    return exp(predicted + min(max(step, -STRIDE), STRIDE))


def _logs(item: Round, limit: float) -> tuple[float, float]:
    """Return logarithms of the predicted and the found loss; found may be <= 0 (perplexity can fall), infinite, NaN."""
    found = max(limit / SPAN, min(limit * SPAN, item.found))  # in this order NaN is the most
    return log(max(item.shared.loss, LEAST_LOSS)), log(found)


def _smallest(budget: Budget, loss: float) -> Shared:
    try:
        return budget.smallest(loss)
    except Infeasible:
        return budget.share(budget.most)


def held_out(run: Run, tokens: torch.Tensor, text: str | None) -> tuple[torch.Tensor, list[Window]]:
    """Return calibration windows (samples, T) and held-out ones to measure on: of a text, or an eighth of the former.

    Raises UsageError where there are too few windows to share.
    """
    from ..evaluation.text import read_text

    samples, seq_len = tokens.shape
    if text is not None:
        windows = make_windows(run.source.tokenizer, read_text(text), seq_len, None, HELD_OUT_WINDOWS)
        check_ids(run.source.model, run.source.tokenizer, (window.tokens for window in windows))
        return tokens, windows
    if samples < HELD_OUT_SHARE:
        raise UsageError(
            f"{samples} calibration samples are too few to hold some out for measuring; pass {HELD_OUT_SHARE} or "
            "more --samples, or --text."
        )
    aside = torch.arange(samples) % HELD_OUT_SHARE == HELD_OUT_SHARE // 2
    return tokens[~aside], [Window(window, seq_len - 1) for window in tokens[aside]]
