"""How fast one row goes through packed weights here, beside what this machine's memory allows.

In the cache: one weight again and again, small enough to stay there; the arithmetic and the call are what takes time.
From memory: weights that take turns, so that no cache serves them; a kernel that does its job then reads about as fast
as a sum over a large tensor. The best of many calls counts, as other work on the machine only ever slows them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch.nn import functional as F

from ..formats import DENSE
from ..kernels.cpu import library
from ..kernels.registry import choose
from ..machine.compute_dtype import name_of
from ..machine.memory import available_bytes
from ..machine.timing import best_in_turns
from ..numerics.qtensor import QTensor
from ..spec import QuantSpec
from ..units import size

BITS, GROUP = (4, 8), 128
CACHED, COLD = (1024, 1024), (4096, 4096)  # N and K: half a megabyte in 4 bits, and one of the matrices of a 7B model
COLD_BYTES = 96 << 20  # of weights in turn: three times the L3 of the largest part this was measured on
SECONDS = 0.3  # for each of the four measurements
ROOM = 700 << 20  # bytes: weights in turn for two dtypes of x, two float32 matrices, and what packing them takes
# From memory at this share of its bandwidth, or in the cache this close to as slow: that is what limits a kernel.
NEAR_BANDWIDTH, NEAR_CACHED = 0.7, 1.2
CPU = torch.device("cpu")
Call = Callable[[torch.Tensor], torch.Tensor]


def measure_kernels() -> dict[str, Any] | str:
    """Time the kernels that are chosen for 4 and 8 bits and one row of x, on the threads that torch has.

    Returns level, threads, read_gb_per_s and rows; or a sentence that says why nothing was measured.
    """
    found = library.load()
    if isinstance(found, str):
        return f"Not measured: the native CPU kernel {found}."
    if (free := available_bytes()) < ROOM:
        return f"Not measured: that takes {size(ROOM)} of memory, and {size(free)} are free; end other programs."
    try:
        with torch.inference_mode():
            rows = [row for bits in BITS for row in _rows_of(bits)]
            bandwidth = read_bandwidth()
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # torch's allocator raises these
            raise
        return f"Not measured: there was no memory for it; {size(ROOM)} are needed, so end other programs."
    return {
        "level": library.level(),
        "threads": torch.get_num_threads(),
        "read_gb_per_s": bandwidth,
        "rows": [{**row, "limit": limit_of(row, bandwidth)} for row in rows],
    }


def _rows_of(bits: int) -> list[dict[str, Any]]:
    """Return what is measured of one width, for both dtypes of x."""
    cached, cold = _Weights(bits, CACHED), _Weights(bits, COLD)
    dtypes = {name_of(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    of_cached = best_in_turns({name: cached.calls(dtype, 1) for name, dtype in dtypes.items()}, SECONDS)
    calls = {name: cold.calls(dtype, copies(cold.bytes)) for name, dtype in dtypes.items()}
    floats, x = [torch.randn(COLD) for _ in range(2)], torch.randn(1, COLD[1])
    of_cold = best_in_turns({**calls, "linear": [partial(F.linear, x, weight) for weight in floats]}, SECONDS)
    return [
        {
            "bits": bits,
            "x": name,
            "kernel": cold.kernel(dtype).name,
            "cached_ns_per_weight": 1e9 * of_cached[name] / prod(CACHED),
            "ns_per_weight": 1e9 * of_cold[name] / prod(COLD),
            "gb_per_s": cold.bytes / of_cold[name] / 1e9,
            "times_float32_linear": of_cold["linear"] / of_cold[name],
        }
        for name, dtype in dtypes.items()
    ]


class _Weights:
    """A packed weight of random codes, and calls that multiply one row with it."""

    def __init__(self, bits: int, shape: tuple[int, int]):
        self.spec, self.shape = QuantSpec(bits, GROUP), shape
        self.parts = DENSE.pack(random_weight(self.spec, shape))
        self.bytes = sum(part.nbytes for part in self.parts.values())

    def kernel(self, dtype: torch.dtype) -> Any:
        return choose(self.spec, self.shape, CPU, dtype).kernel

    def calls(self, dtype: torch.dtype, count: int) -> list[Callable[[], torch.Tensor]]:
        """Return a call for each of `count` equal weights, each in memory of its own."""
        kernel, x = self.kernel(dtype), torch.randn(1, self.shape[1]).to(dtype)
        prepared = kernel.prepare(self.parts, self.spec, self.shape, dtype)
        return [partial(kernel.run, x, copy.deepcopy(prepared)) for _ in range(count)]


def limit_of(row: dict[str, Any], bandwidth: float) -> str:
    """Return what limits a kernel from memory: "memory", "arithmetic", or "both" where each takes its share."""
    if row["gb_per_s"] >= NEAR_BANDWIDTH * bandwidth:
        return "memory"
    return "arithmetic" if row["ns_per_weight"] <= NEAR_CACHED * row["cached_ns_per_weight"] else "both"


def random_weight(spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
    """Return uniform codes, and scales that keep products near 1."""
    rows, columns = spec.scales_shape(shape)
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8)
    scales = torch.full((rows, columns), 0.01, dtype=torch.float16)
    zeros = None if spec.symmetric else torch.full((rows, columns), spec.mid, dtype=torch.uint8)
    return QTensor(spec, codes, scales, zeros)


def copies(weight_bytes: int) -> int:
    """Return how many weights take turns."""
    return max(1, min(512, ceil(COLD_BYTES / weight_bytes)))


def read_bandwidth() -> float:
    """Return the GB/s at which all threads read a tensor that no cache holds."""
    values = torch.ones(1 << 25)
    return values.nbytes / best_in_turns({"": [values.sum]}, 0.0, rounds=20, in_a_row=1)[""] / 1e9
