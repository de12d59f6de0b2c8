"""What operators of packed weights need on a GPU: its limits, room for parts of sums and for unpacked weights."""

from __future__ import annotations

import functools

import torch

from .device import shared_limit
from .packed import Device, Workspace

WORKSPACE_FLOATS = 8 << 20  # room for the sums of 264 blocks of 256 rows and 64 tokens, twice
WORKSPACE_COUNTERS = 1 << 16


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Return rows contiguous, at an address that 16-byte loads can start from."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


@functools.cache
def capability(index: int) -> int:
    """Return a number such as 90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def device_limits(index: int) -> Device:
    """Return what the shape of a launch depends on."""
    return Device(torch.cuda.get_device_properties(index).multi_processor_count, shared_limit(index))


# Streams run beside each other and must not share these; a stream's launches run one after another and may.


@functools.cache
def workspace(index: int, stream: int) -> Workspace:
    """Return room for parts of sums; its counters are zero between launches."""
    device = torch.device("cuda", index)
    return Workspace(
        torch.empty(WORKSPACE_FLOATS, device=device),
        torch.zeros(WORKSPACE_COUNTERS, dtype=torch.int32, device=device),
    )


@functools.cache
def unpacked_buffer(index: int, stream: int, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """Return room for an unpacked weight (N, K), never freed: a captured graph goes on writing there."""
    return torch.empty(shape, dtype=dtype, device=torch.device("cuda", index))
