"""Rows of two code widths: two products, each by the kernel chosen for its width, and their outputs in row order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats import TWO_WIDTHS, Parts
from ..formats.two_widths import wide_rows
from ..spec import QuantSpec
from .base import Kernel, Prepared
from .checks import expect_product


@dataclass(frozen=True)
class TwoProducts:
    """What both kernels prepared; order: int64 (N,), the place of each output in those of the first and the second."""

    shape: tuple[int, int]
    narrow: Prepared
    wide: Prepared
    order: torch.Tensor


@dataclass(frozen=True)
class TwoWidths:
    """The kernels of both halves of a weight (`QuantSpec.halves`) as one."""

    narrow: Kernel
    wide: Kernel

    @property
    def name(self) -> str:
        """The name of both kernels, or the two names."""
        return " + ".join(dict.fromkeys((self.narrow.name, self.wide.name)))

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        halves = zip((self.narrow, self.wide), spec.halves(shape), strict=True)
        reasons = [kernel.supports(*half, device, dtype) for kernel, half in halves]
        return next((reason for reason in reasons if reason is not None), None)

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> TwoProducts:
        rows = wide_rows(parts, spec, shape)
        stored = TWO_WIDTHS.dense_halves(parts, spec, shape)
        halves = zip((self.narrow, self.wide), stored, spec.halves(shape), strict=True)
        narrow, wide = (kernel.prepare(own, *half, dtype) for kernel, own, half in halves)
        return TwoProducts(shape, narrow, wide, torch.argsort(torch.argsort(rows.int(), stable=True)))

    def run(self, x: torch.Tensor, prepared: TwoProducts, bias: torch.Tensor | None = None) -> torch.Tensor:
        expect_product(x, *prepared.shape, bias)
        halves = [self.narrow.run(x, prepared.narrow), self.wide.run(x, prepared.wide)]
        y = torch.cat(halves, -1).index_select(-1, prepared.order)
        return y if bias is None else y + bias.to(y.dtype)
