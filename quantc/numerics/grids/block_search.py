"""The search for the numbers of GGUF's block types: least squared error of values exactly as they will be stored.

Tensors of weights are (R, B, n, g): R rows, B blocks in a row, n groups in a block, g weights in a group. On Gaussian
weights with random importance the squared error is 0.76 to 1.01 of what llama.cpp's own search leaves with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...spec import Ggml
from .block_scales import BlockScales, codes_near, levels_of, values_of
from .clipping import CHUNK_WEIGHTS
from .scale_dtypes import LARGEST_SCALE

# Ranges that a grid covers: steps more or fewer than it has, which decide from 4 bits on, and shares of the whole,
# which decide below.
MORE_STEPS = tuple(step / 5 - 1.0 for step in range(11))
SHARES = (0.9, 0.8, 0.7, 0.6)
TABLE_SHARES = (1.2, 1.15, 1.1, 1.05, 1.0, 0.95)  # in place of steps, where these are not even
FITS = 2  # least squares after each rounding
D_SHARES = (1.0, 0.97, 0.94, 1.04)  # of the d that makes the largest sub-scale the largest number
NEIGHBOURS = (-1, 0, 1)  # of a sub-scale or sub-minimum that are tried
ROUNDS = 2  # of trying neighbours, then fitting d and dmin
LEAST_IMPORTANCE = 1e-6  # of the mean: what no input of the text has shown still counts


def search_blocks(weight: torch.Tensor, grid: Ggml, importance: torch.Tensor | None) -> BlockScales:
    """Return the numbers of least squared error for weight (N, K), K a multiple of the block.

    importance: float (K,), how much the squared error of an input counts (a Gram diagonal), or None.
    """
    spread = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
    spread = (spread / spread.mean().clamp(min=1e-30)).clamp(min=LEAST_IMPORTANCE)
    shape = (-1, grid.groups_in_block, grid.group)
    parts = weight.float().unflatten(1, shape).split(max(1, CHUNK_WEIGHTS // weight.shape[1]))
    found = [_Search(grid, part, spread.reshape(shape)).found() for part in parts]

    def joined(name: str) -> torch.Tensor | None:
        each = [getattr(part, name) for part in found]
        return None if each[0] is None else torch.cat(each)

    d = joined("d")
    assert d is not None
    return BlockScales(grid, d, joined("dmin"), joined("subs"), joined("sub_minima"))


def sub_limits(grid: Ggml) -> tuple[int, int]:
    """Return the least and the largest sub-scale; they have a sign where groups have no base."""
    count = 1 << grid.sub_bits
    return (1, count - 1) if grid.minima else (-count // 2, count // 2 - 1)


class _Search:
    """The numbers of blocks (R, B, n, g), improved step by step; importance (B, n, g)."""

    def __init__(self, grid: Ggml, blocks: torch.Tensor, importance: torch.Tensor):
        self.grid, self.blocks, self.importance = grid, blocks, importance

    def found(self) -> BlockScales:
        steps, bases = self._ideal()
        best = self._improved(self._stored(steps, bases, D_SHARES[0]))
        for share in D_SHARES[1:] if self.grid.sub_bits else ():
            other = self._improved(self._stored(steps, bases, share))
            best = other.where(self._error(other).sum(-1) < self._error(best).sum(-1), best)
        return best

    def _improved(self, scales: BlockScales) -> BlockScales:
        for _ in range(ROUNDS):
            scales = self._refitted(self._moved(scales) if self.grid.sub_bits else scales)
        return scales

    def _ideal(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return steps and bases (R, B, n) of least error where these may be any floats."""
        low, high = self.blocks.amin(-1).clamp(max=0), self.blocks.amax(-1).clamp(min=0)
        error, best_step, best_base = torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)
        for step, base in self._ranges(low, high):
            for fits in range(FITS + 1):
                if fits:
                    step, base = self._fitted(step, base)
                found = self._error_of(step, base)
                better = found < error
                error = torch.where(better, found, error)
                best_step, best_base = torch.where(better, step, best_step), torch.where(better, base, best_base)
        return best_step, best_base

    def _ranges(self, low: torch.Tensor, high: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        longest = self.grid.reach
        around = TABLE_SHARES if self.grid.table else tuple(longest / (longest + more) for more in MORE_STEPS)
        for ratio in (*around, *SHARES):
            if self.grid.minima:
                yield (high - low) * (ratio / longest), low * ratio
            else:
                # On the side that has one level more. Where neither has, scales are above 0: with both signs llama.cpp
                # decoded files of Q8_0 10 % slower.
                extreme = torch.minimum(low, -high) if self.grid.mirrored else torch.where(-low > high, low, high)
                yield -extreme * (ratio / longest), torch.zeros_like(low)

    def _fitted(self, step: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return step and base that fit the codes best; no base above 0 where sub-minima have no sign."""
        levels = levels_of(self.grid, codes_near(self.grid, self.blocks, step[..., None], base[..., None]))
        h = self.importance
        square, product = (h * levels * levels).sum(-1), (h * levels * self.blocks).sum(-1)
        if not self.grid.minima:
            return torch.where(square > 0, product / square, step), base
        weights, sums, values = h.sum(-1).expand_as(step), (h * levels).sum(-1), (h * self.blocks).sum(-1)
        fitted = (product * weights - sums * values) / (square * weights - sums * sums)
        offset = (values - fitted * sums) / weights
        if self.grid.sub_bits:
            fitted, offset = torch.where(offset > 0, product / square, fitted), offset.clamp(max=0)
        sound = torch.isfinite(fitted) & torch.isfinite(offset) & (fitted > 0)
        return torch.where(sound, fitted, step), torch.where(sound, offset, base)

    def _stored(self, steps: torch.Tensor, bases: torch.Tensor, share: float) -> BlockScales:
        """Return the numbers as float16 and whole numbers; share: see D_SHARES."""
        grid = self.grid
        if not grid.sub_bits:
            return BlockScales(grid, _float16(steps[..., 0]), _float16(-bases[..., 0]) if grid.minima else None)
        low, high = sub_limits(grid)
        if not grid.minima:
            extreme = steps.gather(-1, steps.abs().argmax(-1, keepdim=True))[..., 0]
            d = _float16(extreme * (share / low))
            return BlockScales(grid, d, None, _whole(steps, d, (low, high)))
        d, dmin = _float16(steps.amax(-1) * (share / high)), _float16(-bases.amin(-1) * (share / high))
        return BlockScales(grid, d, dmin, _whole(steps, d, (low, high)), _whole(-bases, dmin, (0, high)))

    def _moved(self, scales: BlockScales) -> BlockScales:
        """Move every sub-scale and sub-minimum by one where that lowers the error of its group."""
        assert scales.subs is not None
        error, best = self._error(scales), scales
        low, high = sub_limits(self.grid)
        for more in NEIGHBOURS:
            for other in NEIGHBOURS if scales.sub_minima is not None else (0,):
                tried = BlockScales(self.grid, scales.d, scales.dmin, (scales.subs + more).clamp(low, high))
                if scales.sub_minima is not None:
                    tried.sub_minima = (scales.sub_minima + other).clamp(0, high)
                found = self._error(tried)
                best = tried.where(found < error, best)
                error = torch.minimum(found, error)
        return best

    def _refitted(self, scales: BlockScales) -> BlockScales:
        """Fit d and dmin to codes and whole numbers, where that lowers the error of a block."""
        h, one = self.importance, torch.ones((), device=self.blocks.device)
        codes = codes_near(self.grid, self.blocks, scales.steps()[..., None], scales.bases()[..., None])
        a = levels_of(self.grid, codes) * (one if scales.subs is None else scales.subs.float()[..., None])
        aa, ay = (h * a * a).sum((-1, -2)), (h * a * self.blocks).sum((-1, -2))
        if scales.dmin is None:
            tried = BlockScales(self.grid, _float16(ay / aa), None, scales.subs)
        else:
            b = -(one if scales.sub_minima is None else scales.sub_minima.float()[..., None]).expand_as(a)
            bb, ab, by = (h * b * b).sum((-1, -2)), (h * a * b).sum((-1, -2)), (h * b * self.blocks).sum((-1, -2))
            determinant = aa * bb - ab * ab
            d = torch.where(bb > 0, (ay * bb - ab * by) / determinant, ay / aa)
            dmin = torch.where(bb > 0, (aa * by - ab * ay) / determinant, scales.dmin.float())
            dmin = dmin.clamp(min=0) if self.grid.sub_bits else dmin
            tried = BlockScales(self.grid, _float16(d), _float16(dmin), scales.subs, scales.sub_minima)
        return tried.where(self._error(tried).sum(-1) < self._error(scales).sum(-1), scales)

    def _error(self, scales: BlockScales) -> torch.Tensor:
        return self._error_of(scales.steps(), scales.bases())

    def _error_of(self, steps: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
        """Return (R, B, n), the weighted squared error of every group."""
        step, base = steps[..., None], bases[..., None]
        values = values_of(self.grid, codes_near(self.grid, self.blocks, step, base), step, base)
        return values.sub_(self.blocks).square_().mul_(self.importance).sum(-1).nan_to_num_(torch.inf)


def _float16(values: torch.Tensor) -> torch.Tensor:
    return values.nan_to_num(0.0).clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)


def _whole(values: torch.Tensor, unit: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    safe = torch.where(unit == 0, torch.inf, unit.float())[..., None]
    return (values / safe).round_().clamp_(*limits).to(torch.int16)
