"""Times native CPU products of weights with dropped groups beside dense ones of as many bits, in one process.

Groups of 16, a share of which is dropped, against dense groups of 64 and of 16: milliseconds, GB/s of the image read,
and how many times as fast. The competitors take turns, and so do weights, so that no cache serves them; each product is
checked first. Each figure is the best of the rounds: on a machine that others use, compare within one run only.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe, machine, markdown, write_json
from benchmarks.speed.cpu_matmul import measure, native
from quantc.formats import GROUP_SPARSE, format_of
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE, NativeWeight
from quantc.machine.compute_dtype import name_of
from quantc.numerics.qtensor import QTensor
from quantc.runtime.kernel_speed import Call, copies, random_weight
from quantc.spec import QuantSpec

SHAPES = [(576, 1536), (4096, 4096), (4096, 11008)]
GROUP, PEERS = 16, (64, 16)


def drop(tensor: QTensor, spec: QuantSpec) -> QTensor:
    """The groups of a spec with sparsity that stay, any of them."""
    rows, columns = spec.scales_shape(tensor.shape)
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[torch.randperm(rows * columns)[: spec.kept_groups(tensor.shape)]] = True
    full = QTensor(spec, tensor.codes, tensor.scales, tensor.zeros, kept=kept.view(rows, columns))
    return GROUP_SPARSE.unpack(GROUP_SPARSE.pack(full), spec, tensor.shape)


def prepared(spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> list[NativeWeight]:
    """As many equal weights as no cache holds; the first is checked."""
    tensor = random_weight(QuantSpec(spec.bits, spec.group_size), shape)
    tensor = drop(tensor, spec) if spec.sparsity else tensor
    parts = format_of(spec).pack(tensor)
    first = NATIVE.prepare(parts, spec, shape, dtype)
    check(first, tensor, torch.randn(2, shape[1]).to(dtype))
    check(first, tensor, torch.randn(1, shape[1]).to(dtype))
    return [first, *(NATIVE.prepare(parts, spec, shape, dtype) for _ in range(copies(first.image.nbytes) - 1))]


def check(weight: NativeWeight, tensor: QTensor, x: torch.Tensor) -> None:
    """A wrong kernel is never fast."""
    exact = x.double() @ tensor.dequantize(torch.float64).T
    error = (NATIVE.run(x, weight).double() - exact).norm() / exact.norm()
    if error > (1e-5 if x.dtype == torch.float32 else 1e-2):
        raise RuntimeError(f"{tensor.spec.label()} is off by {error:.2g} of the product's norm")


def rows_of(shape: tuple[int, int], dtype: torch.dtype, args: Any) -> list[dict[str, Any]]:
    specs = [QuantSpec(args.bits, GROUP, sparsity=args.sparsity), *(QuantSpec(args.bits, group) for group in PEERS)]
    weights = {spec.label(): prepared(spec, shape, dtype) for spec in specs}
    calls: dict[str, list[Call]] = {name: [native(weight) for weight in own] for name, own in weights.items()}
    out = []
    for m in args.tokens:
        best = measure(calls, dict.fromkeys(calls, torch.randn(m, shape[1]).to(dtype)), args.seconds)
        sparse, *dense = best
        row = {"N x K": f"{shape[0]} x {shape[1]}", "x": name_of(dtype), "M": m}
        row |= {f"{name} ms": round(ms, 4) for name, ms in best.items()}
        row["GB/s"] = round(weights[sparse][0].image.nbytes / best[sparse] / 1e6, 1)
        out.append(row | {f"x {name}": round(best[name] / best[sparse], 2) for name in dense})
    return out


def main() -> int:
    parser = describe(__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--seconds", type=float, default=2.0, help="for one shape and number of rows")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    args = parser.parse_args()
    sys.stdout.write(f"{library.describe()}\n")
    rows = [row for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for row in rows_of(shape, dtype, args)]
    sys.stdout.write(markdown(rows) + "\n")
    if args.out:
        write_json(args.out, {"machine": machine(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
