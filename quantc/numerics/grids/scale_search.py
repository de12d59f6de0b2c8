"""The search for scales of a table of values: least squared error with scales exactly as they will be stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...spec import Groups
from ..groups import importance_by_group, to_counts, to_groups
from .clipping import CHUNK_WEIGHTS
from .points import Points
from .stored_scales import More, StoredScales

# Scales that are tried, over the one that takes a group's largest weight to the largest value: up to half as large
# again, which takes it to 4 of FP4's 6, down to where as much is clipped as the rest gains.
RATIOS = tuple(0.6 + step / 20 for step in range(19))
FITS = 3  # least squares after that
SMALLEST_NORM = 1e-30


def search_scales(
    weight: torch.Tensor, points: Points, stored: StoredScales, groups: Groups, importance: torch.Tensor | None
) -> tuple[torch.Tensor, More]:
    """Return stored scales, shaped as groups.counts, and what they share, for weight (N, K).

    importance: see Arithmetic.fit.
    """
    search = _Search(to_groups(weight.float(), groups), points, importance_by_group(importance, weight, groups))
    wanted = to_counts(search.ideal(), groups)
    more = stored.shared(wanted)
    best, least = None, torch.full_like(wanted, torch.inf)
    for tried in stored.near(wanted, more):
        scales = stored.values(tried, more)
        error = to_counts(search.errors(scales if groups.per_oc else scales.T), groups)
        better = error < least
        best, least = tried if best is None else torch.where(better, tried, best), torch.minimum(error, least)
    assert best is not None
    return best, more


class _Search:
    """Weights group by group (rows, G, g), each over its norm: the largest of its group. importance: (G, g)."""

    def __init__(self, groups: torch.Tensor, points: Points, importance: torch.Tensor | None):
        self._points, self._importance = points, importance
        self._norms = groups.abs().amax(2).clamp(min=SMALLEST_NORM)
        self._parts = (groups / self._norms[..., None]).split(max(1, CHUNK_WEIGHTS // groups[0].numel()))
        # With all values in pairs a scale has no sign that matters.
        self._signs = (1,) if torch.equal(points.rising, -points.rising.flip(0)) else (1, -1)

    def ideal(self) -> torch.Tensor:
        """Return float32 (rows, G), the scales of least error where these may be any floats; 0 for groups of zeros."""
        return torch.cat([self._ideal(part) for part in self._parts]) * self._norms

    def errors(self, scales: torch.Tensor) -> torch.Tensor:
        """Return (rows, G), the weighted squared error of every group over its squared norm."""
        each = (scales / self._norms).split([len(part) for part in self._parts])
        return torch.cat([self._error(part, own) for part, own in zip(self._parts, each, strict=True)])

    def _ideal(self, part: torch.Tensor) -> torch.Tensor:
        best = part.abs().amax(2) / self._points.top
        least = self._error(part, best)
        for tried in self._tried(best):
            best, least = self._better(part, tried, best, least)
        for _ in range(FITS):
            best, least = self._better(part, self._fitted(part, best), best, least)
        return best

    def _tried(self, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        for sign in self._signs:
            for ratio in RATIOS:
                yield whole * (sign * ratio)

    def _better(
        self, part: torch.Tensor, tried: torch.Tensor, best: torch.Tensor, least: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        error = self._error(part, tried)
        return torch.where(error < least, tried, best), torch.minimum(error, least)

    def _values(self, part: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self._points.at(self._points.nearest(part / over(scales)[..., None]))

    def _error(self, part: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        lost = self._values(part, scales).mul_(scales[..., None]).sub_(part).square_()
        return (lost if self._importance is None else lost.mul_(self._importance)).sum(2).nan_to_num_(torch.inf)

    def _fitted(self, part: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the scales that fit the codes best."""
        values = self._values(part, scales)
        weighted = values if self._importance is None else values * self._importance
        fitted = (weighted * part).sum(2) / (weighted * values).sum(2)
        return torch.where(torch.isfinite(fitted), fitted, scales)


def over(scales: torch.Tensor) -> torch.Tensor:
    """Return scales to divide by: infinity for 0, so that the quotient is 0."""
    return torch.where(scales == 0, torch.inf, scales)
