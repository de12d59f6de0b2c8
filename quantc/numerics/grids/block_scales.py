"""The numbers of GGUF's block types: float16 scales of blocks, whole numbers for groups, and the values of codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...spec import Ggml
from .points import points_of


@dataclass
class BlockScales:
    """What a weight (..., N, K) keeps, with B blocks in a row and n groups in a block.

    d, dmin: float16 (..., N, B). subs, sub_minima: int16 (..., N, B, n). dmin is minus the base of a group where there
    are no sub_minima. None where the grid has none.
    """

    grid: Ggml
    d: torch.Tensor
    dmin: torch.Tensor | None = None
    subs: torch.Tensor | None = None
    sub_minima: torch.Tensor | None = None

    def steps(self) -> torch.Tensor:
        """Return float32 (..., N, B, n), the steps of groups, as readers compute them."""
        return _of_groups(self.d, self.subs, self.grid)

    def bases(self) -> torch.Tensor:
        """Return float32 (..., N, B, n), what is added to a step times a level."""
        if self.dmin is None:
            return torch.zeros((), device=self.d.device).expand(*self.d.shape, self.grid.groups_in_block)
        return -_of_groups(self.dmin, self.sub_minima, self.grid)

    def where(self, better: torch.Tensor, other: BlockScales) -> BlockScales:
        """Return these numbers where they are better, those of another elsewhere.

        better: bool (N, B), or (N, B, n), which leaves those of whole blocks alone.
        """

        def pick(name: str) -> torch.Tensor | None:
            own, others = getattr(self, name), getattr(other, name)
            if own is None:
                return None
            if own.ndim < better.ndim:
                return own
            return torch.where(better if own.ndim == better.ndim else better[..., None], own, others)

        d = pick("d")
        assert d is not None
        return BlockScales(self.grid, d, pick("dmin"), pick("subs"), pick("sub_minima"))


def _of_groups(of_blocks: torch.Tensor, subs: torch.Tensor | None, grid: Ggml) -> torch.Tensor:
    spread = of_blocks.float()[..., None]
    return spread.expand(*of_blocks.shape, grid.groups_in_block) if subs is None else spread * subs.float()


def codes_near(grid: Ggml, weights: torch.Tensor, steps: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """Return the codes, float32, whose values are nearest to weights; steps and bases broadcast to them."""
    safe = torch.where(steps == 0, torch.inf, steps)  # any code will do where the step is 0
    levels = (weights - bases) / safe
    if grid.table:
        return points_of(grid.table, levels.device).nearest(levels).float()
    return levels.round_().add_(grid.mid).clamp_(grid.least_code, grid.levels - 1)


def levels_of(grid: Ggml, codes: torch.Tensor) -> torch.Tensor:
    """Return the levels of float32 codes: what steps are multiplied with."""
    return points_of(grid.table, codes.device).of_codes(codes) if grid.table else codes - grid.mid


def values_of(grid: Ggml, codes: torch.Tensor, steps: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """Return the values of float32 codes, by llama.cpp's operations in their order."""
    return codes * steps + bases if grid.minima else levels_of(grid, codes) * steps
