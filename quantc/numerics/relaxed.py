"""A quantized weight that can be trained: every code may move by a step, every scale by a factor.

The forward pass rounds as the stored weight will; gradients pass through rounding as if it were not there
(straight-through, Bengio et al. 2013, arXiv:1308.3432). Rounding offsets are SignRound's (Cheng et al. 2023,
arXiv:2309.05516), here from codes that error feedback has found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..qtensor import QTensor, spread_groups
from .hadamard import rotate_back

REACH = 1.0  # codes move by so much at most: to a neighbour
INSIDE = 0.49  # how far from its code a weight may start: rounding then gives that code


class RelaxedWeight(nn.Module):
    """The effective weight (..., N, K) of a QTensor as a function of `offsets` and `factors`.

    offsets: float32 (..., N, K), added to codes before they are rounded. factors: float32, shaped as the scales, which
    are multiplied by 1 + factors. A low-rank addition stays as it is.
    """

    def __init__(self, tensor: QTensor, turned: torch.Tensor):
        """turned: float32 (..., N, K), the weight before it was rounded, rotated as the spec says.

        It says to which neighbour a code goes first. Where error feedback has taken a code elsewhere than to the point
        nearest to it, the code starts at that side of its own point.
        """
        super().__init__()
        self.tensor = tensor
        self.offsets = nn.Parameter(torch.zeros_like(turned))
        self.factors = nn.Parameter(torch.zeros_like(tensor.scales, dtype=torch.float32))
        self._zeros, self._top = tensor.zero_points(), tensor.largest_codes()
        self._bottom = torch.zeros_like(self._top)
        stays = tensor.stays()
        if stays is not None:  # what is dropped stays at its zero point
            self._top, self._bottom = (torch.where(stays, end, self._zeros) for end in (self._top, self._bottom))
        scales = spread_groups(tensor.scales.float(), tensor.spec, tensor.shape)
        codes = tensor.codes.float()
        self._start = codes + (turned / scales + self._zeros - codes).clamp_(-INSIDE, INSIDE)

    def forward(self) -> torch.Tensor:
        """float32 (..., N, K): what unrotated inputs are multiplied with."""
        return _effective(self.tensor, self._stored_codes() - self._zeros, self._stored_scales())

    @torch.no_grad()
    def clamp_offsets(self) -> None:
        """Keep codes within reach of where they started."""
        self.offsets.clamp_(-REACH, REACH)

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """The weight as it is now."""
        codes = self._stored_codes().round_().to(torch.uint8)
        return replace(self.tensor, codes=codes, scales=self._stored_scales().to(torch.float16))

    def _stored_codes(self) -> torch.Tensor:
        codes = _straight_through(self._start + self.offsets, torch.round)
        return torch.minimum(torch.maximum(codes, self._bottom), self._top)

    def _stored_scales(self) -> torch.Tensor:
        return _stored(self.tensor.scales, self.factors)


def rescaled(tensor: QTensor, factors: torch.Tensor) -> torch.Tensor:
    """float32 (..., N, K): the effective weight with its scales multiplied by 1 + factors, as they would be stored."""
    return _effective(tensor, tensor.codes.float() - tensor.zero_points(), _stored(tensor.scales, factors))


def with_scales(tensor: QTensor, factors: torch.Tensor) -> QTensor:
    """The weight with its scales multiplied by 1 + factors."""
    return replace(tensor, scales=_stored(tensor.scales, factors).to(torch.float16))


def _stored(scales: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _straight_through(scales.float() * (1 + factors), _as_float16)


def _effective(tensor: QTensor, steps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight of so many steps of these scales, with what the spec adds to it."""
    weight = steps * spread_groups(scales, tensor.spec, tensor.shape)
    if tensor.low_rank_a is not None and tensor.low_rank_b is not None:
        weight = weight + tensor.low_rank_b.float() @ tensor.low_rank_a.float()
    return rotate_back(weight, tensor.spec.hadamard) if tensor.spec.hadamard else weight


def _as_float16(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float16).float()


def _straight_through(values: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`change` of values, with the gradient of the values themselves."""
    return values + (change(values.detach()) - values.detach())
