"""What a packed weight multiplies: checked before an address is handed to C++ or CUDA, with the errors of nn.Linear."""

from __future__ import annotations

from collections.abc import Container
from math import prod

import torch


def expect_product(
    x: torch.Tensor, n: int, k: int, bias: torch.Tensor | None, dtypes: Container[torch.dtype] | None = None
) -> torch.Size:
    """Return the shape of x (..., K), which multiplies a weight (N, K) on x's device.

    Raises RuntimeError where nn.Linear does: for x of no dimension, of another width or of no floating dtype, and for a
    bias that is not (N,), of no floating dtype or on another device. dtypes: what the kernel takes; None for all.
    """
    shape = x.shape
    if not shape or shape[-1] != k:
        raise _mismatch(shape, n, k)
    if not x.is_floating_point() if dtypes is None else x.dtype not in dtypes:
        raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {_name(x.dtype)} and a packed weight")
    if bias is not None:
        _expect_bias(bias, n, x.device)
    return shape


def _mismatch(shape: torch.Size, n: int, k: int) -> RuntimeError:
    if not shape:
        return RuntimeError("both arguments to linear need to be at least 1D, but they are 0D and 2D")
    rows = prod(shape[:-1])
    return RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({rows}x{shape[-1]} and {k}x{n})")


def _expect_bias(bias: torch.Tensor, n: int, device: torch.device) -> None:
    if bias.shape != (n,):
        raise RuntimeError(f"a bias {tuple(bias.shape)} cannot be added to {n} outputs; it must be ({n},)")
    if not bias.is_floating_point():
        raise RuntimeError(f"self and mat2 must have the same dtype, but got a bias of {_name(bias.dtype)}")
    expect_same_device(device, bias.device)


def expect_same_device(one: torch.device, other: torch.device) -> None:
    """Raise RuntimeError, as torch does, for tensors on two devices."""
    if one != other:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {one} and {other}!"
        )


def expect_tensors(
    needed: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: dict[str, torch.Tensor | None]
) -> None:
    """Raise ValueError for a tensor that is not contiguous, of the shape and of the dtype needed; None passes."""
    for name, (shape, dtype) in needed.items():
        tensor = tensors[name]
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous()):
            found = f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"
            raise ValueError(f"{name} must be contiguous {shape} {dtype}, and is {found}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
