"""QTensor: a quantized weight, unpacked. Its grid computes the weights it represents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..spec import QuantSpec
from .grids import Arithmetic, Parameters, arithmetic_of
from .groups import spread_groups
from .hadamard import rotate_back
from .rows import put_rows, take_rows


@dataclass
class QTensor:
    """Codes and parameters of one weight W (N, K); leading dimensions (experts) are allowed throughout.

    codes: uint8 (..., N, K), below 2^bits.
    scales, zeros, more: the parameters of groups, see Parameters; scales float16 (..., *spec.scales_shape).
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
    more: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: QuantSpec, codes: torch.Tensor, parameters: Parameters, **others: Any) -> QTensor:
        """Return the weight with these parameters; others: low-rank factors, wide and kept, where there are any."""
        return cls(spec, codes, parameters.scales, parameters.zeros, more=parameters.more, **others)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[-2], self.codes.shape[-1]

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.scales, self.zeros, self.more)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return W (..., N, K), computed in float32 and cast last; low-rank not included."""
        groups = self.spec.groups
        found = self.by_width(self.codes, lambda grid, codes, parameters: grid.value(codes, parameters, groups))
        return found.to(dtype)

    def steps_(self, codes: torch.Tensor) -> torch.Tensor:
        """Convert float32 codes (..., N, K), in place, into what the scales of their groups multiply."""
        groups = self.spec.groups
        return self.by_width(codes, lambda grid, codes, parameters: grid.steps_(codes, parameters, groups))

    def strides_(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply float32 values (..., N, K), in place, by how far codes are apart before they are scaled."""
        return arithmetic_of(self.spec.grid).strides_(values, self.parameters, self.spec.groups)

    def bases(self) -> torch.Tensor | None:
        """Return what minima add to the weights, float32 (..., N, K), or None."""
        return arithmetic_of(self.spec.grid).bases(self.parameters, self.spec.groups, self.shape)

    def positions(self, weight: torch.Tensor) -> torch.Tensor:
        """Return where weights (..., N, K) are among the codes, as fractions of codes, float32."""

        def compute(grid: Arithmetic, weight: torch.Tensor, parameters: Parameters) -> torch.Tensor:
            return grid.positions(weight, parameters, self.spec.groups)

        return self.by_width(weight, compute)

    def zero_points(self) -> torch.Tensor:
        """Return the codes of 0, float32 (..., N, K), or as broadcasts to it; for grids that hold 0."""

        def zeros(grid: Arithmetic, codes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
            found = grid.zero_points(parameters, self.spec.groups, (codes.shape[-2], codes.shape[-1]))
            return found if self.wide is None else found.expand(codes.shape)

        return self.by_width(self.codes, zeros)

    def by_width(
        self, codes: torch.Tensor, compute: Callable[[Arithmetic, torch.Tensor, Parameters], torch.Tensor]
    ) -> torch.Tensor:
        """Return `compute` of codes (..., N, K), with the rows of each width computed apart where it matters."""
        narrow, wider = arithmetic_of(self.spec.grid), self.spec.grid.wider()
        if self.wide is None or wider is None or not narrow.width_matters(self.parameters):
            return compute(narrow, codes, self.parameters)
        found = [
            compute(grid, take_rows(codes, rows), self.parameters.mapped(partial(take_rows, rows=rows)))
            for grid, rows in ((arithmetic_of(wider), self.wide), (narrow, ~self.wide))
        ]
        return put_rows(self.wide, *found)

    def levels(self) -> torch.Tensor:
        """Return how many codes each row has, float32 (..., N, 1), or as broadcasts to it."""
        levels = torch.tensor(float(self.spec.levels), device=self.codes.device)
        return levels if self.wide is None else torch.where(self.wide[..., None], 2 * levels, levels)

    def stays(self) -> torch.Tensor | None:
        """Return bool (..., N, K), the weights that are not dropped; None where none are."""
        if self.kept is None or self.spec.pattern.drops == "weights":
            return self.kept
        return spread_groups(self.kept, self.spec.groups, self.shape)

    def effective_weight(self) -> torch.Tensor:
        """Return float32 (..., N, K): what x is multiplied with, low-rank addition and rotation included."""
        weight = self.dequantize()
        if self.low_rank_a is not None and self.low_rank_b is not None:
            weight = weight + self.low_rank_b.float() @ self.low_rank_a.float()
        return rotate_back(weight, self.spec.hadamard) if self.spec.hadamard else weight
