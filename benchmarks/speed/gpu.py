"""Builds, checks and times the CUDA kernels on the GPU of this machine.

Every figure comes from one run: the packed matmul beside the vendor's float16 matmul of the same shape, those of
weights with dropped groups and in trellis codes beside that, the search for such codes, the machine's copy bandwidth
and matmul rate, products against float64, greedy text against the reference kernel if --checkpoint names a quantized
model, and from how many tokens on unpacking the weight is faster. Operands take turns, so that no cache serves them.
Writes benchmarks/results/<gpu>.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import describe, machine, markdown, write_json
from benchmarks.speed.gpu_checks import check_products
from benchmarks.speed.gpu_kept import kept_verdict, measure_kept_crossover, time_kept
from benchmarks.speed.gpu_timing import copies_for, copy_bandwidth, matmul_rate, seconds, wall_seconds
from benchmarks.speed.gpu_trellis import WIDTHS, time_search, time_trellis

SHAPES = {  # (N, K)
    "8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LARGE = ((4096, 4096), (14336, 4096), (8192, 28672))  # that the targets are about: small ones are all latency
GROUP = 128
# At least: share of the copy bandwidth at M = 1, and speed in units of the vendor's float16 matmul.
TARGETS: dict[int, float] = {1: 3.0, 16: 2.5, 64: 1.5, 256: 0.9, 512: 0.9, 1024: 0.9}
BANDWIDTH_TARGET = 0.8


def random_weight(shape: tuple[int, int], bits: int) -> Any:
    """A prepared weight of random codes: no time depends on what they are."""
    from quantc.formats import DENSE
    from quantc.kernels.cuda.layout import prepare
    from quantc.spec import QuantSpec

    spec = QuantSpec(bits, GROUP)
    parts = {
        name: torch.randint(0, 256, part.shape, dtype=torch.uint8, device="cuda")
        if part.dtype == torch.uint8
        else torch.full(part.shape, 1e-3, dtype=part.dtype, device="cuda")
        for name, part in DENSE.layout(spec, shape).items()
    }
    return prepare(parts, spec, shape)


def packed_bytes(weight: Any) -> int:
    tensors = (weight.tiles, weight.scales, weight.zeros)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def time_shape(shape: tuple[int, int], bits: int, bandwidth: float) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    from quantc.kernels.cuda.dense import CUDA_PACKED

    n, k = shape
    weight = random_weight(shape, bits)
    size = packed_bytes(weight)
    packed = [weight, *(random_weight(shape, bits) for _ in range(copies_for(size) - 1))]
    dense = [torch.randn(n, k, device="cuda").half() for _ in range(copies_for(2 * n * k))]
    rows = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").half()
        own = seconds(lambda turn, x=x: CUDA_PACKED.run(x, packed[turn]), len(packed))
        vendor = seconds(lambda turn, x=x: x @ dense[turn].T, len(dense))
        rows.append({
            "N": n, "K": k, "bits": bits, "M": m,
            "us": own * 1e6, "vendor_us": vendor * 1e6, "ratio": vendor / own,
            "bytes_per_second": size / own, "of_copy_bandwidth": size / own / bandwidth,
        })  # fmt: skip
    return rows


def measure_crossover(bits: int) -> dict[str, int]:
    """For each large shape: the first of TOKENS from which unpacking the weight is the faster way."""
    from quantc.kernels.cuda import dense

    found = {}
    chosen = dense.crossover
    try:
        for shape in LARGE:
            packed = [random_weight(shape, bits) for _ in range(4)]
            for m in (count for count in TOKENS if count > 16):
                x = torch.randn(m, shape[1], device="cuda").half()
                times = []
                for limit in (m + 1, m):
                    dense.crossover = lambda _, limit=limit: limit
                    times.append(seconds(lambda turn, x=x, packed=packed: dense.CUDA_PACKED.run(x, packed[turn]), 4))
                if times[1] < times[0]:
                    found["x".join(map(str, shape))] = m
                    break
    finally:
        dense.crossover = chosen
    return found


def time_rotations(bandwidth: float) -> list[dict[str, Any]]:
    """The online rotation beside torch's matmuls and beside one read and one write of x."""
    from quantc.kernels.cuda import hadamard
    from quantc.numerics.hadamard import block_order, rotate

    rows = []
    for width in (4096, 14336, 28672):
        for m in (1, 16, 1024):
            x, block = torch.randn(m, width, device="cuda").half(), block_order(width)
            own = seconds(lambda _, x=x, block=block: hadamard.rotate(x, block), 8)
            usual = seconds(lambda _, x=x, block=block: rotate(x, block), 8)
            moved = 2 * x.numel() * x.element_size()
            rows.append({
                "K": width, "order": block, "M": m, "us": own * 1e6, "torch_us": usual * 1e6,
                "ratio": usual / own, "of_copy_bandwidth": moved / own / bandwidth,
            })  # fmt: skip
    return rows


def time_quantizing() -> list[dict[str, Any]]:
    """A GPTQ sweep and a Gram matrix by the kernels and by torch."""
    from quantc.kernels.cuda.gptq import panel_for
    from quantc.kernels.cuda.gram import add_gram
    from quantc.numerics.grids import fit_grid
    from quantc.numerics.rounding import factorize, gptq
    from quantc.spec import QuantSpec

    rows = []
    for n, k in ((4096, 4096), (4096, 14336)):
        x = torch.randn(2 * k, k, device="cuda").bfloat16()
        gram = torch.zeros(k, k, device="cuda")
        own = seconds(lambda _, x=x, gram=gram: add_gram(x, gram), 2)
        usual = seconds(lambda _, x=x, gram=gram: gram.addmm_(x.float().T, x.float()), 2)
        rows.append({"what": f"Gram matrix, {2 * k} x {k}", "ms": own * 1e3, "torch_ms": usual * 1e3})
        weight, spec = torch.randn(n, k, device="cuda"), QuantSpec(4, GROUP)
        factor, grid = factorize(x.float().T @ x.float()), fit_grid(weight, spec)
        times = []
        for panel in (panel_for(torch.device("cuda", torch.cuda.current_device())), None):
            times.append(wall_seconds(lambda w=weight, f=factor, g=grid, s=spec, p=panel: gptq(w, f, g, s, p)))
        rows.append({"what": f"GPTQ sweep, {n} x {k}", "ms": times[0] * 1e3, "torch_ms": times[1] * 1e3})
    return rows


def compare_text(checkpoint: Path, tokens: int = 200) -> dict[str, Any]:
    """Greedy text in float16 beside the reference kernel's in float32, and the margin where they part."""
    import transformers

    import quantc

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("The river rises in the hills and", return_tensors="pt").to("cuda")
    texts = {}
    for dtype in (torch.float32, torch.float16):
        model: Any = quantc.load(checkpoint, dtype=dtype, device="cuda")
        output = model.generate(**prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        texts[dtype] = output[0, prompt.input_ids.shape[1] :].tolist()
        if dtype == torch.float32:
            logits = model(output).logits[0, prompt.input_ids.shape[1] - 1 : -1].topk(2).values
    wanted, found = texts[torch.float32], texts[torch.float16]
    first = next((at for at, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), None)
    margin = None if first is None else float(logits[first, 0] - logits[first, 1])
    return {"tokens": tokens, "first_difference": first, "margin_of_logits": margin}


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each target beside the worst of the large shapes at 4 bits."""
    large = [row for row in rows if row["bits"] == 4 and (row["N"], row["K"]) in LARGE]
    judged = [("M = 1, of copy bandwidth", BANDWIDTH_TARGET, [r["of_copy_bandwidth"] for r in large if r["M"] == 1])]
    judged += [(f"M = {m}, x vendor", bar, [r["ratio"] for r in large if r["M"] == m]) for m, bar in TARGETS.items()]
    return [
        {"target": name, "at least": bar, "worst": f"{min(found):.2f}", "holds": min(found) >= bar}
        for name, bar, found in judged
    ]


def show(result: dict[str, Any]) -> None:
    bandwidth, rate = result["copy_bandwidth"] / 1e9, result["matmul_rate"] / 1e12
    print(f"{result['gpu']}: copy {bandwidth:.0f} GB/s, float16 {rate:.0f} TFLOP/s")
    figures = {"us": "{:.1f}", "vendor_us": "{:.1f}", "ratio": "{:.2f}", "of_copy_bandwidth": "{:.0%}"}
    keys = ("N", "K", "bits", "M", *figures)
    print(markdown([{key: figures.get(key, "{}").format(row[key]) for key in keys} for row in result["matmul"]]))
    figures |= dict.fromkeys(("dense_us", "uneven_us"), figures["us"])
    print(markdown([{key: figures.get(key, "{}").format(row[key]) for key in row} for row in result["kept"]]))
    print(markdown([*verdicts(result["matmul"]), kept_verdict(result["kept"], 4, LARGE)]))
    worst = max(result["checks"], key=lambda row: row["worst"])
    print(f"products: worst {worst['worst']:.2f} of the tolerance ({worst['spec']}, {worst['dtype']})")
    for key in ("rotation", "quantizing", "trellis", "trellis_search"):
        print(markdown([{k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in result[key]]))
    print(f"unpacking is faster from: {result['crossover']}; with dropped groups from: {result['kept_crossover']}")
    if "text" in result:
        print(f"greedy text: {result['text']}")


def main() -> int:
    parser = describe(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a quantized model whose greedy text is compared")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--models", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>.json")
    args: argparse.Namespace = parser.parse_args()

    from quantc.kernels.cuda.device import unavailable

    reason = unavailable()
    if reason is not None:
        print(f"The CUDA kernels cannot run: a kernel {reason}.", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    checks = check_products()
    bandwidth = copy_bandwidth()
    result: dict[str, Any] = {
        "gpu": name, "machine": machine(), "copy_bandwidth": bandwidth, "matmul_rate": matmul_rate(torch.float16),
        "group_size": GROUP, "checks": checks,
        "matmul": [row for model in args.models for shape in SHAPES[model] for bits in args.bits
                   for row in time_shape(shape, bits, bandwidth)],
        "kept": [row for model in args.models for shape in SHAPES[model] for bits in args.bits
                 for row in time_kept(shape, bits, random_weight, bandwidth)],
        "trellis": [row for model in args.models for shape in SHAPES[model] for bits in WIDTHS
                    for row in time_trellis(shape, bits, random_weight, bandwidth)],
        "trellis_search": time_search(),
        "crossover": measure_crossover(args.bits[0]), "kept_crossover": measure_kept_crossover(LARGE, args.bits[0]),
        "rotation": time_rotations(bandwidth), "quantizing": time_quantizing(),
    }  # fmt: skip
    if args.checkpoint:
        result["text"] = compare_text(args.checkpoint)
    show(result)
    out = args.out or Path(__file__).parents[1] / "results" / f"{name.lower().replace(' ', '-')}.json"
    write_json(out, result)
    failed = [row["spec"] for row in checks if row["worst"] > 1 or not row["kernel"].startswith("cuda")]
    if failed:
        print(f"wrong or not run by the CUDA kernels: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
