"""The kernels in order of preference, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import QuantSpec
from .base import Kernel
from .cpu.native import NATIVE
from .cpu.torch_int4 import TORCH_INT4
from .cpu.trellis import NATIVE_TRELLIS
from .cuda.dense import CUDA_PACKED
from .cuda.kept import CUDA_KEPT
from .cuda.trellis import CUDA_TRELLIS
from .reference import REFERENCE
from .two_widths import TwoWidths

KERNELS: tuple[Kernel, ...] = (
    CUDA_PACKED,
    CUDA_KEPT,
    CUDA_TRELLIS,
    NATIVE,
    NATIVE_TRELLIS,
    TORCH_INT4,
    REFERENCE,
)


@dataclass(frozen=True)
class Choice:
    """The kernel that runs, and why each preferred one does not."""

    kernel: Kernel
    refused: dict[str, str]


def choose(spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Choice:
    """Return the first kernel that supports a weight (N, K) on a device with activations of a dtype.

    Of a weight in two widths: the first for each.
    """
    if spec.wide_rows:
        narrow, wide = (choose(*half, device, dtype) for half in spec.halves(shape))
        return Choice(TwoWidths(narrow.kernel, wide.kernel), {**wide.refused, **narrow.refused})
    refused: dict[str, str] = {}
    for kernel in KERNELS:
        reason = kernel.supports(spec, shape, device, dtype)
        if reason is None:
            return Choice(kernel, refused)
        refused[kernel.name] = reason
    raise AssertionError("the reference kernel supports everything")
