"""A model held against limits: how far it may be from its original; where it is farther, what in it loses most."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError, as_option
from ..frontend.gguf import GgufSource
from ..frontend.source import PathLike
from ..machine.compute_dtype import name_of
from ..progress import Progress
from .blame import Blame, find_blame
from .blocks import Blocks, mismatch
from .restore import Pair
from .scores import Scores, score
from .side_by_side import Reading, SideBySide

ORIGINAL, MODEL = 0, 1


@dataclass(frozen=True)
class Limits:
    """The largest KL divergence in nats per token and the largest increase of the perplexity, 0.02 for 2 %.

    Raises UsageError where neither is given, or one is not more than 0.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.max_kl is None and self.max_ppl_increase is None:
            raise UsageError("no limit was given; pass --max-kl 0.05, --max-ppl-increase 2%, or both.")
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{as_option(name)} is {value:g}, but a limit is more than 0; 0.05 is an example.")


@dataclass(frozen=True)
class Held:
    """A limit, by the setting it came from, what was measured, and whether that is within it."""

    name: str
    limit: float
    measured: float
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """Whether a model holds all its limits, with all scores; blame: what loses most, where it does not."""

    model: str
    against: str
    passed: bool
    limits: list[Held]
    scores: Scores
    dtype: str
    dtype_reason: str
    notes: list[str]
    blame: Blame | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_model(model: PathLike, original: PathLike, limits: Limits, reading: Reading, progress: Progress) -> Verdict:
    """Return whether a model is as near to its original as the limits say; see api.check."""
    models = SideBySide([original, model], reading, progress)
    theirs, ours = models.load(ORIGINAL), models.load(MODEL)
    scores = score(ours, theirs, models.windows, progress, "check")
    if isinstance(models.opened[MODEL], GgufSource):
        models.notes.append(
            f"the weights of {models.names[MODEL]} were dequantized; `quantc eval` asks llama.cpp itself"
        )
    held = _hold(limits, scores)
    passed = all(each.holds for each in held)
    blame = None if passed else _blame(models, ours, theirs)
    return Verdict(
        models.names[MODEL],
        models.names[ORIGINAL],
        passed,
        held,
        scores,
        name_of(models.choice.dtype),
        models.choice.why,
        models.notes,
        blame,
    )


def _hold(limits: Limits, scores: Scores) -> list[Held]:
    assert scores.mean_kl is not None
    assert scores.perplexity_original is not None
    measured = {
        "max_kl": scores.mean_kl,
        "max_ppl_increase": scores.perplexity / scores.perplexity_original - 1,
    }
    given = {name: limit for name, limit in vars(limits).items() if limit is not None}
    return [Held(name, limit, measured[name], measured[name] <= limit) for name, limit in given.items()]


def _blame(models: SideBySide, ours: Any, theirs: Any) -> Blame:
    """Return what loses most; only a note where the two models have no blocks in common."""
    blocks, original = Blocks.of(ours, models.opened[MODEL]), Blocks.of(theirs, models.opened[ORIGINAL])
    if (why := mismatch(blocks, original, models.windows[0].tokens)) is not None:
        return Blame(notes=[f"what loses most in {models.names[MODEL]} was not looked for: {why}"])
    return find_blame(ours, theirs, Pair(blocks, original), models.windows, models.progress)
