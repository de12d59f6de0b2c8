"""Times the native CPU matmul beside torch's on this machine, in one process, the competitors taking turns.

For shapes of 135M, 1B and 7B models: milliseconds, GB/s of packed weight read, and how many times faster than F.linear
in float32 and bfloat16, than torch's int4 operator and than the same kernels with codes of 4 bits. Weights take turns
too, so that no cache serves them, and every product is checked first. The read bandwidth is that of a sum over a large
tensor, measured beside every shape and number of rows, as it changes on a shared machine. The arithmetic bound is the
speed of the same kernel for one row and one small weight again and again, which its threads' caches hold: no memory can
make it faster. Each figure is the best of the rounds: on a machine that others use, compare within one run only.

With --trellis BITS ... also weights in trellis codes of these widths.

With --ggml LIBRARY ... also than ggml's fastest 4-bit type for the same shape (see ggml_matmul.py), measured right
before in a process of its own. There its weights take turns with nobody else's, so that for this ratio own weights of
bfloat16 rows are measured by themselves too ("alone ms").

With --rotated WIDTH ... instead: square 4-bit linears that rotate their input, beside the same ones without a rotation
and with torch's rotation before them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.common import describe, machine, markdown, write_json
from quantc.formats import DENSE, Parts
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE, NativeWeight
from quantc.kernels.cpu.torch_int4 import TORCH_INT4
from quantc.kernels.registry import choose
from quantc.machine.compute_dtype import name_of
from quantc.machine.timing import best_in_turns
from quantc.numerics.hadamard import block_order, rotate
from quantc.numerics.qtensor import QTensor
from quantc.runtime.kernel_speed import Call, copies, random_weight, read_bandwidth
from quantc.spec import WHOLE_ROW, QuantSpec, Trellis

SHAPES = {
    "135M": [(576, 576), (1536, 576), (576, 1536)],
    "1B": [(2048, 2048), (8192, 2048), (2048, 8192)],
    "7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
CPU = torch.device("cpu")


def specs_of(args: Any) -> dict[str, QuantSpec]:
    """Return the specs to be timed, by the first word of their competitors' names."""
    grids = {f"w{bits}": QuantSpec(bits, args.group) for bits in args.bits}
    return grids | {f"t{bits}": QuantSpec(bits, WHOLE_ROW, code=Trellis.name) for bits in args.trellis}


def random_parts(spec: QuantSpec, shape: tuple[int, int]) -> Parts:
    """Return the stored parts of a weight of any codes; those of a trellis are any bits."""
    if spec.code != Trellis.name:
        return DENSE.pack(random_weight(spec, shape))
    layout = DENSE.layout(spec, shape)
    codes, scales = torch.randint(0, 256, layout["qweight"].shape), torch.full(layout["scales"].shape, 0.01)
    return {"qweight": codes.to(torch.uint8), "scales": scales.half()}


def competitors(
    specs: dict[str, QuantSpec], shape: tuple[int, int], int8: bool, of_x: list[torch.dtype]
) -> tuple[dict[str, list[Call]], dict[str, int], dict[str, torch.dtype]]:
    """Calls on weights of their own, bytes of one packed weight, and the dtype of x, by name."""
    calls: dict[str, list[Call]] = {}
    sizes: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}

    def add(name: str, dtype: torch.dtype, size: int, make: Callable[[], Call]) -> None:
        calls[name], sizes[name], dtypes[name] = [make() for _ in range(copies(size))], size, dtype

    k = shape[1]
    for dtype in of_x:
        dense = torch.randn(shape).to(dtype)
        add(f"F.linear {name_of(dtype)}", dtype, dense.nbytes, lambda dense=dense: through(F.linear, dense.clone()))
    for word, spec in specs.items():
        parts = random_parts(spec, shape)
        size = sum(part.nbytes for part in parts.values())
        for dtype in of_x:
            add(f"{word} {name_of(dtype)}", dtype, size, lambda dtype=dtype, parts=parts, spec=spec: packed(
                choose(spec, shape, CPU, dtype).kernel, parts, spec, shape, dtype))  # fmt: skip
        if int8 and spec.code != Trellis.name:
            add(f"{word} int8", of_x[0], size, lambda parts=parts, spec=spec: packed_int8(parts, spec, shape))
        if torch.bfloat16 in of_x and TORCH_INT4.supports(spec, shape, CPU, torch.bfloat16) is None:
            add("torch int4", torch.bfloat16, size, lambda parts=parts, spec=spec: packed(
                TORCH_INT4, parts, spec, shape, torch.bfloat16))  # fmt: skip
        check(calls, dtypes, word, DENSE.unpack(parts, spec, shape), k)
    return calls, sizes, dtypes


def through(linear: Callable[..., torch.Tensor], weight: torch.Tensor) -> Call:
    return lambda x: linear(x, weight)


def packed(kernel: Any, parts: Any, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> Call:
    prepared = kernel.prepare({name: part.clone() for name, part in parts.items()}, spec, shape, dtype)
    return lambda x: kernel.run(x, prepared)  # type: ignore[no-any-return]


def packed_int8(parts: Any, spec: QuantSpec, shape: tuple[int, int]) -> Call:
    NATIVE.int8 = True
    try:
        return packed(NATIVE, parts, spec, shape, torch.bfloat16)
    finally:
        NATIVE.int8 = False


def check(calls: dict[str, list[Call]], dtypes: dict[str, torch.dtype], word: str, tensor: QTensor, k: int) -> None:
    """A wrong kernel is never fast."""
    x = torch.randn(2, k)
    exact = x.double() @ tensor.dequantize(torch.float64).T
    for name in [name for name in calls if name.startswith(f"{word} ")]:
        error = (calls[name][0](x.to(dtypes[name])).double() - exact).norm() / exact.norm()
        limit = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 2e-2}[name.split()[1]]
        if error > limit:
            raise RuntimeError(f"{name} is off by {error:.2g} of the product's norm")


def measure(calls: dict[str, list[Call]], inputs: dict[str, torch.Tensor], seconds: float) -> dict[str, float]:
    """Best milliseconds of one call, every competitor taking a short turn in every round."""
    bound = {name: [partial(weight, inputs[name]) for weight in weights] for name, weights in calls.items()}
    return {name: best * 1e3 for name, best in best_in_turns(bound, seconds).items()}


def arithmetic_bounds(bits: list[int], group: int) -> dict[str, float]:
    """GB/s of packed weight, by width, at which a row of bfloat16 is multiplied where the weight comes from a cache."""
    shape = (2048, 2048)  # a megabyte a thread at 4 bits; less of it, and the calls themselves are what takes time
    found = {}
    for width in bits:
        parts = DENSE.pack(random_weight(QuantSpec(width, group), shape))
        call = packed(NATIVE, parts, QuantSpec(width, group), shape, torch.bfloat16)
        best = measure({"": [call]}, {"": torch.randn(1, shape[1]).bfloat16()}, 0.5)[""]
        found[str(width)] = round(sum(part.nbytes for part in parts.values()) / best / 1e6, 1)
    return found


def ggml_rows(shape: tuple[int, int], args: Any) -> list[dict[str, Any]]:
    """Milliseconds of ggml's 4-bit types in every order it has for them: rows of ggml_matmul.py."""
    if not args.ggml:
        return []
    script = Path(__file__).with_name("ggml_matmul.py")
    options = ["--shape", *shape, "--tokens", *args.tokens, "--threads", torch.get_num_threads()]
    command = [sys.executable, str(script), *args.ggml, *map(str, options), "--seconds", str(args.seconds / 4)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def rows_of(model: str, shape: tuple[int, int], args: Any) -> list[dict[str, Any]]:
    of_ggml = ggml_rows(shape, args)
    of_x = [getattr(torch, name) for name in args.dtypes]
    calls, sizes, dtypes = competitors(specs_of(args), shape, args.int8, of_x)
    out = []
    for m in args.tokens:
        inputs = {name: torch.randn(m, shape[1]).to(dtype) for name, dtype in dtypes.items()}
        best = measure(calls, inputs, args.seconds)
        of_m = {f"ggml {found['type']} {found['order']}": found for found in of_ggml if found["M"] == m}
        of_ggml_ms = min((found["ms"] for found in of_m.values()), default=None)
        own = [name for name in calls if name.startswith("w") and name.endswith("bfloat16")] if of_m else []
        alone = {name: measure({name: calls[name]}, inputs, args.seconds / 4)[name] for name in own}
        bandwidth = round(read_bandwidth(), 1)
        timed = {name: (best[name], sizes[name]) for name in calls}
        timed |= {name: (found["ms"], found["bytes"]) for name, found in of_m.items()}
        for name, (ms, size) in timed.items():
            row = {"model": model, "level": library.level(), "N x K": f"{shape[0]} x {shape[1]}", "M": m, "what": name}
            row |= {"ms": round(ms, 4), "GB/s": round(size / ms / 1e6, 1), "read GB/s": bandwidth}
            for peer in ("F.linear float32", "F.linear bfloat16", "torch int4"):
                row[f"x {peer}"] = round(best[peer] / ms, 2) if peer in best else "-"
            same = f"w4 {name.rpartition(' ')[2]}"
            row["x w4"] = round(best[same] / ms, 2) if same in best else "-"
            if of_ggml_ms:
                row["alone ms"] = round(alone[name], 4) if name in alone else "-"
                row["x ggml"] = round(of_ggml_ms / alone.get(name, ms), 2)
            out.append(row)
    return out


def rows_of_rotated(width: int, args: Any) -> list[dict[str, Any]]:
    """What a rotation of the input costs, as a share of the product without one.

    All competitors read the same images, as of two equal weights of 8192 x 8192 one was read 1.7 times as fast by where
    it came to lie; each at another time, so that none finds in a cache what the one before it has read.
    """
    spec, block, shape = QuantSpec(4, args.group), block_order(width), (width, width)
    parts = DENSE.pack(random_weight(spec, shape))
    rounds = range(copies(sum(part.nbytes for part in parts.values())))
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = [NATIVE.prepare(parts, spec, shape, dtype) for _ in rounds]
        plain = [native(weight) for weight in weights]
        third = len(weights) // 3
        rotated = [native(replace(weight, hadamard=block)) for weight in weights[third:] + weights[:third]]
        by_torch = [after_rotation(call, block) for call in plain[2 * third :] + plain[: 2 * third]]
        check_rotated(rotated[0], by_torch[0], torch.randn(3, width).to(dtype))
        calls = {"plain": plain, "rotated": rotated, "torch": by_torch}
        for m in args.tokens:
            best = measure(calls, dict.fromkeys(calls, torch.randn(m, width).to(dtype)), args.seconds)
            row = {"N = K": width, "block": block, "M": m, "x": name_of(dtype), "plain ms": round(best["plain"], 4)}
            row |= {f"{name} +%": round(100 * (best[name] / best["plain"] - 1), 1) for name in ("rotated", "torch")}
            out.append(row)
    return out


def native(weight: NativeWeight) -> Call:
    return lambda x: NATIVE.run(x, weight)


def after_rotation(call: Call, block: int) -> Call:
    return lambda x: call(rotate(x, block))


def check_rotated(call: Call, expected: Call, x: torch.Tensor) -> None:
    y = expected(x).double()
    error = (call(x).double() - y).norm() / y.norm()
    if error > (1e-5 if x.dtype == torch.float32 else 1e-2):
        raise RuntimeError(f"the rotated product is off by {error:.2g} of its norm")


def main() -> int:
    parser = describe(__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--trellis", nargs="+", type=int, default=[], metavar="BITS", help="also trellis codes")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128])
    parser.add_argument("--int8", action="store_true", help="also with activations rounded to int8")
    parser.add_argument("--ggml", nargs="+", metavar="LIBRARY", help="libraries of one ggml, or one that exports it")
    parser.add_argument("--rotated", nargs="+", type=int, metavar="WIDTH", help="what rotations of these widths cost")
    parser.add_argument("--quick", action="store_true", help="one shape of each model")
    parser.add_argument("--seconds", type=float, default=2.0, help="for one shape and number of rows")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    args = parser.parse_args()
    sys.stdout.write(f"{library.describe()}\nread bandwidth {read_bandwidth():.1f} GB/s\n")
    bounds = arithmetic_bounds(args.bits, args.group)
    sys.stdout.write(f"arithmetic bound at one row, GB/s by bits: {bounds}\n")
    rows: list[dict[str, Any]] = []
    shapes = [(model, shape) for model in args.models for shape in SHAPES[model][: 1 if args.quick else None]]
    tables = (rows_of_rotated(width, args) for width in args.rotated or ())
    for found in tables if args.rotated else (rows_of(model, shape, args) for model, shape in shapes):
        sys.stdout.write(markdown(found) + "\n\n")
        sys.stdout.flush()
        rows += found
    bandwidth = read_bandwidth()
    bounds = {bits: max(bound, bounds[bits]) for bits, bound in arithmetic_bounds(args.bits, args.group).items()}
    sys.stdout.write(f"read bandwidth {bandwidth:.1f} GB/s, arithmetic bound {bounds}\n")
    if args.out:
        write_json(
            args.out, {"machine": machine(), "read_gb_per_s": bandwidth, "arithmetic_gb_per_s": bounds, "rows": rows}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
