"""How long work takes on a GPU, with operands that its cache does not hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from math import ceil

import torch

COLD_BYTES = 512 << 20  # of operands that take turns: several times any second-level cache
REPLAYS = 9


def copies_for(size: int) -> int:
    """How many operands of `size` bytes take turns."""
    return max(2, ceil(COLD_BYTES / size))


def seconds(call: Callable[[int], object], turns: int) -> float:
    """Time of one call(i), i in turn from 0 to turns - 1; captured into one graph, so that launching costs nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            call(turn)
    graph.replay()
    return statistics.median(_replay(graph) for _ in range(REPLAYS)) / turns


def wall_seconds(call: Callable[[], object]) -> float:
    """Time of one call that no graph can hold, the best of three after one to warm up."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy within the GPU's memory."""
    size = 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.zero_()
    return 2 * size / seconds(lambda _: target.copy_(source), 4)


def matmul_rate(dtype: torch.dtype) -> float:
    """Multiply-adds per second, times two, of a product of 8192 x 8192 matrices of random numbers."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda _: a @ b, 4)
