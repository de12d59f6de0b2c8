"""Finds what in a quantized model hurts most: the blocks, then the linears in them, by halving.

A part's loss is that of the model with everything else restored. What is measured so adds up, nearly, and one broken
part does not hide another: beside a second one that ruins the predictions, restoring the first would change nothing.
How far restoring the parts found takes the whole model is measured in the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import CalibrationError
from ..progress import LogProgress, Progress
from ..units import number
from .restore import Pair, Part, restored
from .scores import score
from .windows import Window

WANTED = 3  # parts of each kind
MOST_WINDOWS = 4
MOST_VALUES = 1 << 28  # predictions of the original that are kept, 1 GiB in float32
FURTHER = 12  # measurements, at most: of the whole, and of what was found
NEGLIGIBLE = 0.1  # of the worst part's loss: what loses less is not looked into
UNEXPLAINED = 0.25  # of a loss: that much beside the linears of a block says that it is not due to them


@dataclass(frozen=True)
class Restored:
    """A part of the model: its loss with all else restored, and the model's before and after restoring it too.

    KL divergences in nats per token; parts in a list are restored one after the other.
    """

    name: str
    alone: float
    before: float
    after: float


@dataclass
class Blame:
    """The parts that lose most, the worst first. predictions: measured on. evaluations: runs over them."""

    blocks: list[Restored] = field(default_factory=list)
    linears: list[Restored] = field(default_factory=list)
    predictions: int = 0
    evaluations: int = 0
    notes: list[str] = field(default_factory=list)


def find_blame(model: Any, original: Any, pair: Pair, windows: Sequence[Window], progress: Progress) -> Blame:
    """Return which blocks of a model, and which linears of these, account for most of its divergence."""
    meter = _Meter(model, original, windows, progress)
    most = _allowance(len(pair.blocks)) + _allowance(WANTED * pair.most_linears) + FURTHER
    progress.stage("find what loses most", most)
    blame = _Search(meter, pair).run()
    progress.done()
    return blame


def heaviest(whole: float, count: int, loss: Callable[[int, int], float]) -> dict[int, float]:
    """Return number -> loss of the items that lose most, of which there are `count`; at most WANTED.

    loss(start, end) measures a range alone. The range that loses most for each of its items is halved next. Where one
    item loses nearly all that takes twice the binary logarithm of the count; it ends after twice as many measurements.
    """
    found: dict[int, float] = {}
    ranges = [(-whole / count, 0, count, whole)]
    left = _allowance(count)
    while ranges and len(found) < WANTED and (left > 0 or not found):
        _, start, end, lost = heappop(ranges)
        if found and lost < NEGLIGIBLE * max(found.values()):
            break
        if end - start == 1:
            found[start] = lost
            continue
        middle = (start + end) // 2
        for low, high in ((start, middle), (middle, end)):
            measured = loss(low, high)
            heappush(ranges, (-measured / (high - low), low, high, measured))
            left -= 1
    return dict(sorted(found.items(), key=lambda item: item[1], reverse=True))


def _allowance(count: int) -> int:
    """Return how many measurements are made to find the heaviest of so many items."""
    return 4 * math.ceil(math.log2(count + 1))


class _Meter:
    """Measures the divergence of a model on a few windows, whose original's predictions are kept."""

    def __init__(self, model: Any, original: Any, windows: Sequence[Window], progress: Progress):
        self._original: Any = _Remembering(original)
        self._model, self._progress = model, progress
        self._windows = _some(windows, original.config.get_text_config().vocab_size)
        self.predictions = sum(window.scored for window in self._windows)
        self.evaluations = 0

    def divergence(self, parts: Sequence[Part], what: str) -> float:
        """Return KL(original || model) with these parts restored; infinite where predictions are not finite.

        what: the progress says of it.
        """
        self.evaluations += 1
        with restored(parts):
            try:
                scores = score(self._model, self._original, self._windows, LogProgress(logging.DEBUG))
            except CalibrationError:
                return math.inf
        assert scores.mean_kl is not None
        self._progress.step(f"{what}: KL divergence {number(scores.mean_kl)}")
        return scores.mean_kl


class _Remembering:
    """A model that runs once on each window."""

    def __init__(self, model: Any):
        self._model, self.device, self.config = model, model.device, model.config
        self._logits: dict[bytes, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, **options: Any) -> SimpleNamespace:
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._logits:
            self._logits[key] = self._model(input_ids=input_ids, **options).logits
        return SimpleNamespace(logits=self._logits[key])


class _Search:
    """The parts of a model, and which of them to measure."""

    def __init__(self, meter: _Meter, pair: Pair):
        self._meter, self._pair = meter, pair
        self._outside = pair.outside
        self._linears: list[Part] = []
        self._notes: list[str] = []

    def run(self) -> Blame:
        start = self._meter.divergence([], "as it is")
        blocks = self._worst_blocks()
        linears = self._worst_linears([at for at in blocks if at >= 0], max(blocks.values(), default=0.0))
        named = {at: self._pair.blocks[at : at + 1] if at >= 0 else self._outside for at in blocks}
        return Blame(
            self._restore(start, [(named[at], alone) for at, alone in blocks.items()]),
            self._restore(start, [([self._linears[at]], alone) for at, alone in linears.items()]),
            self._meter.predictions,
            self._meter.evaluations,
            self._notes,
        )

    def _worst_blocks(self) -> dict[int, float]:
        """Return number -> loss of the worst blocks; -1 is what is outside them."""
        everything = self._pair.blocks

        def alone(start: int, end: int) -> float:
            named = _named(everything[start:end])
            return self._meter.divergence([*everything[:start], *everything[end:], *self._outside], f"{named} alone")

        found = heaviest(alone(0, len(everything)), len(everything), alone)
        found[-1] = self._meter.divergence(everything, f"{_named(self._outside)} alone")
        worst = max(found.values())
        ranked = sorted(found.items(), key=lambda item: item[1], reverse=True)
        return {at: lost for at, lost in ranked if lost >= NEGLIGIBLE * worst and lost > 0}

    def _worst_linears(self, blocks: list[int], worst: float) -> dict[int, float]:
        """Return number -> loss of the worst linears of these blocks."""
        others = [part for at, part in enumerate(self._pair.blocks) if at not in blocks] + self._outside
        for scaled in (True, False):
            parts = [part for at in sorted(blocks) for part in self._pair.linears(at, scaled)]
            if parts and self._meter.divergence([*others, *parts], "all linears restored") <= UNEXPLAINED * worst:
                break
        else:
            if blocks:
                names = ", ".join(self._pair.blocks[at].name for at in sorted(blocks))
                self._notes.append(
                    f"the loss of {names} is not due to single linears: other weights differ too, or they were rotated "
                    "or scaled together"
                )
            return {}
        self._linears = parts

        def alone(start: int, end: int) -> float:
            named = _named(parts[start:end])
            return self._meter.divergence([*others, *parts[:start], *parts[end:]], f"{named} alone")

        return heaviest(alone(0, len(parts)), len(parts), alone)

    def _restore(self, start: float, found: list[tuple[list[Part], float]]) -> list[Restored]:
        """Return what restoring the parts, one after the other, does to the whole model."""
        done: list[Part] = []
        result, before = [], start
        for parts, alone in found:
            done += parts
            after = self._meter.divergence(done, f"{_named(parts)} restored")
            result.append(Restored(" and ".join(part.name for part in parts), alone, before, after))
            before = after
        return result


def _named(parts: Sequence[Part]) -> str:
    return parts[0].name if len(parts) == 1 else f"{parts[0].name} to {parts[-1].name}"


def _some(windows: Sequence[Window], vocabulary: int) -> list[Window]:
    """Return a few windows from the whole text, as many as the original's predictions may be kept of."""
    longest = max(len(window.tokens) for window in windows)
    count = min(MOST_WINDOWS, len(windows), max(1, MOST_VALUES // (vocabulary * longest)))
    return [windows[at * len(windows) // count] for at in range(count)]
