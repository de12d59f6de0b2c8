"""A quantized weight that can be trained: every code may move by a step, every scale by a factor.

The forward pass rounds as the stored weight will; gradients pass through rounding as if it were not there
(straight-through, Bengio et al. 2013, arXiv:1308.3432). Rounding offsets are SignRound's (Cheng et al. 2023,
arXiv:2309.05516), here from codes that error feedback has found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .grids import MINIMA, to_stored
from .groups import by_group, sums_of_groups
from .hadamard import rotate_back
from .qtensor import QTensor

INSIDE = 0.49  # how far from its code a weight may start: rounding then gives that code
REACH = 1.49  # how far it may go: to a neighbour


class RelaxedWeight(nn.Module):
    """The effective weight (..., N, K) of a QTensor as a function of `offsets` and `factors`.

    offsets: float32 (..., N, K), added to codes before they are rounded; at first what rounding has taken from them.
    factors: float32 (S, ...), shaped as the scales, which are multiplied by 1 + factors; S is 2 where there are minima,
    which are multiplied by those that come second. A low-rank addition stays as it is.
    """

    def __init__(self, tensor: QTensor, turned: torch.Tensor):
        """turned: float32 (..., N, K), the weight before it was rounded, rotated as the spec says.

        It says to which neighbour a code goes first. Where error feedback has taken a code elsewhere than to the point
        nearest to it, the code starts at that side of its own point.
        """
        super().__init__()
        self.tensor = tensor
        self.factors = nn.Parameter(no_factors(tensor))
        self._top = tensor.levels() - 1
        self._bottom = torch.full_like(self._top, tensor.spec.grid.least_code)
        stays = tensor.stays()
        if stays is not None:  # what is dropped stays at its zero point
            zeros = tensor.zero_points()
            self._top, self._bottom = (torch.where(stays, end, zeros) for end in (self._top, self._bottom))
        exact = tensor.positions(turned)
        self.offsets = nn.Parameter(exact.sub_(tensor.codes).clamp_(-INSIDE, INSIDE))

    def forward(self) -> torch.Tensor:
        """Return float32 (..., N, K), what unrotated inputs are multiplied with; offsets are as clamped."""
        return _completed(self.tensor, _Dequantized.apply(self, self.offsets, self.factors))

    @torch.no_grad()
    def clamp_offsets(self) -> None:
        """Keep codes within their range and within reach of what they were."""
        self.offsets.clamp_(-REACH, REACH)
        points = (self.tensor.codes + self.offsets).clamp_(self._bottom - INSIDE, self._top + INSIDE)
        self.offsets.copy_(points.sub_(self.tensor.codes))

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """Return the weight as it is now."""
        codes = self.codes(self.offsets).clamp_(self._bottom, self._top).to(torch.uint8)
        return replace(with_scales(self.tensor, self.factors), codes=codes)

    def codes(self, offsets: torch.Tensor) -> torch.Tensor:
        """Return rounded codes, float32 (..., N, K)."""
        return (self.tensor.codes + offsets).round_()

    def steps(self, offsets: torch.Tensor) -> torch.Tensor:
        """Return what scales multiply, float32 (..., N, K)."""
        return self.tensor.steps_(self.codes(offsets))


class RescaledWeight(nn.Module):
    """The effective weight of a QTensor whose codes stay, as a function of `factors`, see RelaxedWeight.

    factors: None where the grid's scales stay too.
    """

    def __init__(self, tensor: QTensor):
        super().__init__()
        self.tensor, self.offsets = tensor, None
        self.factors = nn.Parameter(no_factors(tensor)) if "scales" in tensor.spec.grid.trainable else None

    def forward(self) -> torch.Tensor:
        """Return float32 (..., N, K)."""
        return self.tensor.effective_weight() if self.factors is None else rescaled(self.tensor, self.factors)

    def clamp_offsets(self) -> None:
        """Do nothing: codes stay."""

    @torch.no_grad()
    def qtensor(self) -> QTensor:
        """Return the weight as it is now."""
        return self.tensor if self.factors is None else with_scales(self.tensor, self.factors)


def relax(tensor: QTensor, turned: torch.Tensor) -> RelaxedWeight | RescaledWeight:
    """Return the weight with the parts that its grid lets training move; arguments: see RelaxedWeight."""
    return RelaxedWeight(tensor, turned) if "codes" in tensor.spec.grid.trainable else RescaledWeight(tensor)


class _Dequantized(torch.autograd.Function):
    """The weight that the codes and scales of a RelaxedWeight make, before low-rank addition and rotation back.

    Gradients pass through rounding. Nothing but the parameters is kept for the way back: autograd's own record of these
    steps takes 30 bytes for every weight.
    """

    @staticmethod
    def forward(ctx: Any, weight: RelaxedWeight, offsets: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(offsets, factors)
        return _scaled_(weight.steps(offsets), with_scales(weight.tensor, factors))

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        weight: RelaxedWeight = ctx.weight
        (offsets, factors), (slope,) = ctx.saved_tensors, slopes
        by_factor = _by_factors(weight.tensor, weight.steps(offsets), slope)
        by_offset = slope.clone(memory_format=torch.contiguous_format)
        return None, weight.tensor.strides_(_times_scales(by_offset, with_scales(weight.tensor, factors))), by_factor


class _Rescaled(torch.autograd.Function):
    """As _Dequantized for codes that stay. Nothing is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: QTensor, factors: torch.Tensor) -> torch.Tensor:
        ctx.tensor = tensor
        return _scaled_(tensor.steps_(tensor.codes.float()), with_scales(tensor, factors))

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[None, torch.Tensor]:
        tensor: QTensor = ctx.tensor
        return None, _by_factors(tensor, tensor.steps_(tensor.codes.float()), slopes[0])


def rescaled(tensor: QTensor, factors: torch.Tensor) -> torch.Tensor:
    """Return float32 (..., N, K), the effective weight with scales multiplied by 1 + factors, as would be stored."""
    return _completed(tensor, _Rescaled.apply(tensor, factors))


def no_factors(tensor: QTensor) -> torch.Tensor:
    """Return the factors that leave a weight as it is, float32 (S, ...); see RelaxedWeight."""
    return torch.zeros((1 + (MINIMA in tensor.more), *tensor.scales.shape), device=tensor.scales.device)


def with_scales(tensor: QTensor, factors: torch.Tensor) -> QTensor:
    """Return the weight with its scales, and its minima if it has any, multiplied by 1 + factors."""
    more = dict(tensor.more)
    if MINIMA in more:
        more[MINIMA] = _stored(more[MINIMA], factors[1], tensor)
    return replace(tensor, scales=_stored(tensor.scales, factors[0], tensor), more=more)


def _stored(scales: torch.Tensor, factors: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """Return float16 scales multiplied by 1 + factors, as those of a tensor are stored."""
    return to_stored(scales.float() * (1 + factors), tensor.spec.scale_dtype)


def _times_scales(values: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """Multiply values (..., N, K) in place by the scales of their groups, and return them."""
    return by_group(values, tensor.scales.float(), tensor.spec.groups, torch.Tensor.mul_)


def _scaled_(steps: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """Convert steps (..., N, K) in place into the weights that they are with a tensor's scales and minima."""
    scaled, bases = _times_scales(steps, tensor), tensor.bases()
    return scaled if bases is None else scaled.add_(bases)


def _by_factors(tensor: QTensor, steps: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return the gradient of factors, float32 (S, ...), from that of weights (..., N, K); steps are overwritten."""
    sums = sums_of_groups(steps.mul_(slope), tensor.spec.groups)
    found, bases = [sums * tensor.scales.float()], tensor.bases()
    if bases is not None:
        found.append(sums_of_groups(bases.mul_(slope), tensor.spec.groups))
    return torch.stack(found)


def _completed(tensor: QTensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight with its low-rank addition, rotated back."""
    if tensor.low_rank_a is not None and tensor.low_rank_b is not None:
        weight = weight + tensor.low_rank_b.float() @ tensor.low_rank_a.float()
    return rotate_back(weight, tensor.spec.hadamard) if tensor.spec.hadamard else weight
