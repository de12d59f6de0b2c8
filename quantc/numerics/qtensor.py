"""QTensor: a quantized weight, unpacked. The reference arithmetic every kernel is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..spec import QuantSpec
from .hadamard import rotate_back


@dataclass
class QTensor:
    """Codes, scales and zeros of one weight W (N, K); leading dimensions (experts) are allowed throughout.

    codes: uint8 (..., N, K), below 2^bits.
    scales: float16 (..., *spec.scales_shape).
    zeros: uint8, shaped as scales, or None when symmetric.
    low_rank_a, low_rank_b: float16 (..., R, K) and (..., N, R), or None.
    wide: bool (..., N), the rows whose codes are below 2^(bits + 1); None where there are none.
    kept: bool, shaped as scales, the groups that are not dropped, or as codes, the weights that are not where two of
        four are; None where none are dropped. What is dropped has the zero point as its code; a dropped group has scale
        1, and zero 0.
    """

    spec: QuantSpec
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    low_rank_a: torch.Tensor | None = None
    low_rank_b: torch.Tensor | None = None
    wide: torch.Tensor | None = None
    kept: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[-2], self.codes.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W (..., N, K) = (code - zero) * scale, computed in float32 and cast last; low-rank not included."""
        scales = spread_groups(self.scales.float(), self.spec, self.shape)
        return (self.codes.float() - self.zero_points()).mul_(scales).to(dtype)

    def zero_points(self) -> torch.Tensor:
        """float32 (..., N, K), or as broadcasts to it: the code of a weight of 0."""
        if self.zeros is not None:
            return spread_groups(self.zeros.float(), self.spec, self.shape)
        return (self.largest_codes() + 1) / 2

    def largest_codes(self) -> torch.Tensor:
        """float32 (..., N, 1), or as broadcasts to it: one less than there are codes in a row's width."""
        levels = torch.tensor(float(self.spec.levels), device=self.codes.device)
        if self.wide is not None:
            levels = torch.where(self.wide[..., None], 2 * levels, levels)
        return levels - 1

    def stays(self) -> torch.Tensor | None:
        """bool (..., N, K): the weights that are not dropped; None where none are."""
        if self.kept is None or self.spec.two_of_four:
            return self.kept
        return spread_groups(self.kept, self.spec, self.shape)

    def effective_weight(self) -> torch.Tensor:
        """float32 (..., N, K): what x is multiplied with in all, low-rank addition and rotation included."""
        weight = self.dequantize()
        if self.low_rank_a is not None and self.low_rank_b is not None:
            weight = weight + self.low_rank_b.float() @ self.low_rank_a.float()
        return rotate_back(weight, self.spec.hadamard) if self.spec.hadamard else weight


def spread_groups(values: torch.Tensor, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    """Repeat per-group values (..., *scales_shape) over the weights of each group: (..., N, K)."""
    n, k = shape
    g = spec.group_length(shape)
    if spec.grouping == "per_oc":
        return values.repeat_interleave(g, dim=-1)[..., :k]
    return values.repeat_interleave(g, dim=-2)[..., :n, :]


def by_group(
    weights: torch.Tensor,
    values: torch.Tensor,
    spec: QuantSpec,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Contiguous weights (..., N, K), changed in place by the value of each one's group (..., *scales_shape).

    `change` has the weights of a group side by side where groups are full, so that nothing is spread.
    """
    n, k = weights.shape[-2:]
    g = spec.group_length((n, k))
    if spec.grouping == "per_oc" and k % g == 0:
        change(weights.view(*weights.shape[:-1], k // g, g), values[..., None])
    elif spec.grouping == "per_ic" and n % g == 0:
        change(weights.view(*weights.shape[:-2], n // g, g, k), values[..., None, :])
    else:
        change(weights, spread_groups(values, spec, (n, k)))
    return weights


def group_sums(values: torch.Tensor, g: int) -> torch.Tensor:
    """(..., ceil(K/g)): sums over groups of g of the last dimension K."""
    if values.shape[-1] % g == 0:
        return values.unflatten(-1, (-1, g)).sum(-1)
    count = -(-values.shape[-1] // g)
    padded = torch.nn.functional.pad(values, (0, count * g - values.shape[-1]))
    return padded.unflatten(-1, (count, g)).sum(-1)
