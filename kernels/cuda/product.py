"""The product of activations with a packed weight on a GPU: what is the same for every layout of its codes."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.nn import functional as F

from ..checks import expect_product, expect_same_device
from ..gradients import differentiable
from ..rotation import rotate
from .device import device_index
from .kept_layout import KeptWeight
from .launch import launch
from .layout import CODE_BITS, CudaWeight
from .packed import ELEMENTS, X_STEP, Device, Product, Workspace
from .program import Launch
from .resources import aligned, capability, device_limits, unpacked_buffer, workspace
from .trellis_layout import TrellisWeight
from .unpacked import multiply_unpacked, multiply_unpacked_back

BFLOAT16_FROM = 80  # compute capability

Weight = TypeVar("Weight", CudaWeight, KeptWeight, TrellisWeight)


@dataclass(frozen=True)
class Layout(Generic[Weight]):
    """The programs for one layout of codes.

    unpack: the launch that writes the weight into a tensor (N, K). multiply: the launches of a product with few rows.
    unpacked_from: rows from which the vendor's matmul with the unpacked weight is faster, for a weight and a device's
    index. rotates: whether the program for a number of rows rotates them itself. dtypes: of rows.
    """

    unpack: Callable[[Weight, torch.Tensor], Launch]
    multiply: Callable[[Product[Weight], Device, Workspace], list[Launch]]
    unpacked_from: Callable[[Weight, int], int]
    rotates: Callable[[Weight, int], bool]
    dtypes: tuple[torch.dtype, ...] = tuple(ELEMENTS)


def multiply(layout: Layout[Weight], x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K) on the weight's device, on the current stream, without waiting for it.

    Raises RuntimeError for what nn.Linear does not multiply, and for a dtype that the layout has no programs for.
    """
    expect_product(x, *weight.shape, bias, layout.dtypes)
    expect_same_device(x.device, weight.device)
    n, k = weight.shape
    fused = layout.rotates(weight, x.numel() // k)
    rows = aligned((rotate(x, weight.hadamard) if weight.hadamard and not fused else x).reshape(-1, k))
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    index = device_index(x.device)
    stream = torch.cuda.current_stream(index).cuda_stream
    if rows.shape[0] >= layout.unpacked_from(weight, index):
        whole = unpacked_buffer(index, stream, rows.dtype, weight.shape)
        launch(layout.unpack(weight, whole))
        multiply_unpacked(rows, whole, weight, bias, y.view(-1, n))
        return y
    low_rank_t = None
    if weight.low_rank_a is not None:
        low_rank_t = F.linear(rows, weight.low_rank_a.to(rows.dtype)).float()
    product = Product(rows, y.view(-1, n), weight, bias, low_rank_t, unrotated=fused)
    for each in layout.multiply(product, device_limits(index), workspace(index, stream)):
        launch(each)
    return y


def multiply_back(layout: Layout[Weight], y: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Return y (..., N) times the weight (N, K), in y's dtype: a gradient at x, on the current stream."""
    n, k = weight.shape
    index = device_index(y.device)
    rows = y.reshape(-1, n)
    whole = unpacked_buffer(index, torch.cuda.current_stream(index).cuda_stream, y.dtype, weight.shape)
    launch(layout.unpack(weight, whole))
    return multiply_unpacked_back(rows, whole, weight).view(*y.shape[:-1], k)


def differentiated(layout: Layout[Weight], x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `multiply` with gradients to x and bias, which the operators do not have."""
    return differentiable(
        x, bias, lambda x, bias: multiply(layout, x, weight, bias), lambda y: multiply_back(layout, y, weight)
    )


def fake_product(
    x: torch.Tensor, n: object, k: object, bias: object, dtypes: Container[torch.dtype] = ELEMENTS
) -> torch.Tensor:
    """Return an empty y (..., N) for x (..., K), for operators that are traced; raises what `multiply` raises."""
    assert isinstance(n, int)
    assert isinstance(k, int)
    *leading, _ = expect_product(x, n, k, bias if isinstance(bias, torch.Tensor) else None, dtypes)
    return x.new_empty(*leading, n)


def refuse_first(checks: list[tuple[bool, str]]) -> str | None:
    """Return the reason of the first check that does not hold, None where all do."""
    return next((reason for holds, reason in checks if not holds), None)


def element_checks(bits: int, k: int, index: int, dtype: torch.dtype) -> list[tuple[bool, str]]:
    """Return what every program needs of activations and codes, each with the reason where it does not hold."""
    return [
        (dtype in ELEMENTS, f"runs in float16 and bfloat16, not in {str(dtype)[6:]}"),
        (dtype != torch.bfloat16 or capability(index) >= BFLOAT16_FROM, "needs compute capability 8.0 for bfloat16"),
        (bits in CODE_BITS, f"has codes of {', '.join(map(str, CODE_BITS))} bits, not {bits}"),
        (k % X_STEP == 0, f"needs inputs in steps of {X_STEP}, not {k}"),
    ]
