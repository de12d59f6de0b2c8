"""A quality target, met by measuring: plan, build, measure, correct what was predicted, and build again.

The target is a KL divergence, or an increase of the perplexity, on held-out text. The smallest plan that is predicted
to meet it is built; what it measures says by how much predictions are off, and with that the next plan is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from typing import TYPE_CHECKING

import torch

from .budget import Budget, Shared
from .errors import UsageError
from .numerics.allocation import Infeasible
from .pipeline import Run
from .units import number
from .windows import Window, make_windows

if TYPE_CHECKING:
    from .evaluation import Scores

ROUNDS = 3
HELD_OUT_SHARE = 8  # every so many calibration windows one is kept aside
HELD_OUT_WINDOWS = 32  # of a text of its own, at most
AIM = 0.9  # of the target: predictions corrected once are off by a few per cent
LEAST_POWER = 0.5  # of a prediction that its measurement rises by: less, between two builds, is noise
WASTED = 0.75  # of the target: a plan that measures less than this has bits to spare


@dataclass(frozen=True)
class Target:
    """The largest KL divergence in nats per token, or the largest increase of perplexity, 0.02 for 2 %."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is not None and self.max_ppl_increase is not None:
            raise UsageError("max_kl and max_ppl_increase are two targets; leave one of them out.")
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value:g}, but a target is more than 0; 0.05 is an example.")

    @property
    def limit(self) -> float:
        """In the unit of `found`."""
        return self.max_kl if self.max_kl is not None else log(1 + (self.max_ppl_increase or 0.0))

    def found(self, scores: Scores) -> float:
        """What was measured: the KL divergence, or the logarithm of the perplexity's increase, nats per token."""
        if self.max_kl is not None:
            assert scores.mean_kl is not None
            return scores.mean_kl
        assert scores.perplexity_original is not None
        return log(scores.perplexity / scores.perplexity_original)

    @property
    def label(self) -> str:
        """In the name of a folder."""
        return f"kl{self.max_kl:g}" if self.max_kl is not None else f"ppl{100 * (self.max_ppl_increase or 0):g}"

    def describe(self, rounds: list[Round], positions: int) -> str:
        """What was measured in the last of the rounds, which met the target, in a sentence."""
        builds = f"{len(rounds)} of at most {ROUNDS} builds, {positions:,} held-out predictions"
        return f"{self._in_words(rounds[-1].found)}, at most {self._in_words(self.limit)} wanted; {builds}"

    def refuse(self, best: float) -> UsageError:
        """No build met the target; the best one measured this."""
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


def meet(target: Target, budget: Budget, build: Callable[[Shared], float]) -> list[Round]:
    """Builds until one meets the target closely, at most ROUNDS times; the last element is the best one.

    build: builds a plan and measures it, in the unit of `Target.found`. Raises UsageError where no build meets it.
    """
    rounds: list[Round] = []
    while len(rounds) < ROUNDS:
        shared = _smallest(budget, _predicted_for(AIM * target.limit, rounds))
        if any(shared.specs == earlier.shared.specs for earlier in rounds):
            break
        found = build(shared)
        rounds.append(Round(shared, found))
        if WASTED * target.limit <= found <= target.limit:
            break
    met = [item for item in rounds if item.found <= target.limit]
    if not met:
        raise target.refuse(min(item.found for item in rounds))
    best = min(met, key=lambda item: item.shared.bits)
    return [*(item for item in rounds if item is not best), best]


def _predicted_for(wanted: float, rounds: list[Round]) -> float:
    """The predicted loss of a plan that should measure so much.

    What was measured is off by the factor of the one build so far, or by a power and a factor that two builds show.
    """
    known = sorted((log(item.shared.loss), log(max(item.found, 1e-9))) for item in rounds if item.shared.loss > 0)
    if not known:
        return wanted
    nearest = sorted(known, key=lambda point: abs(point[1] - log(wanted)))[:2]
    (predicted, found), (other, found_there) = nearest[0], nearest[-1]
    rises = (found_there - found) * (other - predicted) > 0
    power = max(LEAST_POWER, (found_there - found) / (other - predicted)) if rises else 1.0
    return exp(predicted + (log(wanted) - found) / power)


def _smallest(budget: Budget, loss: float) -> Shared:
    try:
        return budget.smallest(loss)
    except Infeasible:
        return budget.share(budget.most)


def held_out(run: Run, tokens: torch.Tensor, text: str | None) -> tuple[torch.Tensor, list[Window]]:
    """Calibration windows (samples, T) and those that are measured on: of a text, or an eighth of the former.

    Raises UsageError where there are too few windows to share.
    """
    from .eval_text import read_text

    samples, seq_len = tokens.shape
    if text is not None:
        return tokens, make_windows(run.source.tokenizer, read_text(text), seq_len, None, HELD_OUT_WINDOWS)
    if samples < HELD_OUT_SHARE:
        raise UsageError(
            f"{samples} calibration samples are too few to keep some aside for measuring; pass {HELD_OUT_SHARE} or "
            "more --samples, or --text."
        )
    aside = torch.arange(samples) % HELD_OUT_SHARE == HELD_OUT_SHARE // 2
    return tokens[~aside], [Window(window, seq_len - 1) for window in tokens[aside]]
