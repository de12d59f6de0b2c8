"""What a kernel is."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..formats import Parts
from ..spec import QuantSpec, Uniform

Prepared = Any
DENSE_ONLY = "needs a weight as a whole, and some of it is dropped"  # why a kernel refuses sparsity


def other_grid(spec: QuantSpec) -> str | None:
    """Return why a kernel that multiplies codes as numbers refuses a spec; None for uniform grids."""
    return None if isinstance(spec.grid, Uniform) else f"multiplies uniform codes, not {spec.code} ones"


class Kernel(Protocol):
    """A way to compute y = x W^T + bias for a packed weight W (N, K), x rotated first where the spec says so.

    name: shown by `quantc doctor`. supports: None, or the reason why not, as the end of a sentence that starts
    with the kernel's name. prepare: the stored parts in the order the kernel wants, once at load time. run: y. Of a
    weight in two widths a kernel is given one half or the other, never both (kernels/two_widths.py).
    """

    name: str

    def supports(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> str | None: ...

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> Prepared: ...

    def run(self, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y (..., N) for x (..., K) of the prepared dtype, in the same dtype; bias (N,) of any floating dtype.

        Raises RuntimeError, as nn.Linear does, for x or a bias of another shape, dtype or device (checks.py).
        """
