"""What a packed linear costs besides its product: microseconds of a call at one row, on the shapes of SmolLM2-135M.

The same product through the layers that a model's call passes: the C function with its arguments ready, the kernel's
`run`, the module QuantLinear, and beside them F.linear on a float weight of the same shape and nn.Linear on one of
16 x 16, which is torch's own call with hardly a product. Weights stay in the caches, so that what is measured is calls.
Best of many calls, which take turns.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import describe, machine, markdown, write_json
from quantc.formats import DENSE
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE
from quantc.runtime.kernel_speed import random_weight
from quantc.runtime.modules import QuantLinear
from quantc.spec import QuantSpec

SHAPES = [(192, 576), (576, 576), (1536, 576), (576, 1536)]


def module_of(parts: Any, spec: QuantSpec, shape: tuple[int, int]) -> QuantLinear:
    module = QuantLinear(spec, shape, None, torch.float32)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def layers(shape: tuple[int, int], bits: int, threads: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Calls that make the same y, from the innermost to the outermost."""
    spec = QuantSpec(bits, 64)
    parts = DENSE.pack(random_weight(spec, shape))
    module, x = module_of(parts, spec, shape), torch.randn(1, shape[1], dtype=dtype)
    weight, dense = NATIVE.prepare(parts, spec, shape, dtype), torch.randn(shape, dtype=dtype)
    tiny, few = nn.Linear(16, 16, bias=False, dtype=dtype), torch.randn(1, 16, dtype=dtype)
    y = x.new_empty(1, shape[0])
    product = struct.pack(library.PRODUCT, *weight.addresses, y.data_ptr(), 0, 0)
    function, address, kind = library.loaded().matmul, x.data_ptr(), library.TYPES[x.dtype]
    return {
        "C function": lambda _memory=(weight, x, y): function(product, 1, address, 1, shape[1], kind, False, threads),
        "kernel": lambda: NATIVE.run(x, weight),
        "QuantLinear": lambda: module(x),
        "F.linear": lambda: F.linear(x, dense),
        "nn.Linear 16 x 16": lambda: tiny(few),
    }


def best_microseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: 1e6 * seconds for name, seconds in best.items()}


def main() -> int:
    parser = describe(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--out", type=Path, help="also write JSON here")
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            best = best_microseconds(layers(shape, args.bits, threads, getattr(torch, args.dtype)), args.rounds)
            python = best["QuantLinear"] - best["C function"]
            row = {"threads": threads, "N x K": f"{shape[0]} x {shape[1]}"}
            row |= {name: f"{microseconds:.1f}" for name, microseconds in best.items()}
            rows.append(row | {"QuantLinear less C function": f"{python:.1f}"})
    sys.stdout.write(markdown(rows) + "\n")
    if args.out:
        write_json(args.out, {"machine": machine(), "microseconds": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
