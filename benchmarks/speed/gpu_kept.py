"""Times the CUDA kernels of weights with dropped groups beside the dense ones of as many bits, for `benchmarks.gpu`.

Groups of 16, half of them dropped at random or all of half of the rows, against dense groups of 128. Operands take
turns, so that no cache serves them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.gpu_timing import copies_for, seconds

GROUP, SPARSITY = 16, 0.5
TOKENS = (1, 2, 4, 8, 16, 24, 32, 64)
DENSE_TARGET = 1.0  # at least, at M = 1: speed in units of the dense matmul of as many bits


def random_kept(shape: tuple[int, int], bits: int, uneven: bool = False) -> Any:
    """A prepared weight of random codes: no time depends on what they are. Any groups are kept; uneven: the first."""
    from quantc.formats import GROUP_SPARSE
    from quantc.kernels.cuda.kept_layout import prepare
    from quantc.numerics.packing import pack_bits
    from quantc.spec import QuantSpec

    spec = QuantSpec(bits, GROUP, sparsity=SPARSITY)
    rows, columns = spec.scales_shape(shape)
    kept = torch.zeros(rows * columns, dtype=torch.uint8, device="cuda")
    order = (torch.arange if uneven else torch.randperm)(rows * columns, device="cuda")
    kept[order[: spec.kept_groups(shape)]] = 1
    parts = {
        name: torch.randint(0, 256, part.shape, dtype=torch.uint8, device="cuda")
        if part.dtype == torch.uint8
        else torch.full(part.shape, 1e-3, dtype=part.dtype, device="cuda")
        for name, part in GROUP_SPARSE.layout(spec, shape).items()
    }
    return prepare(parts | {"kept": pack_bits(kept.view(rows, columns), 1)}, spec, shape)


def prepared_bytes(weight: Any) -> int:
    """What a product reads of a weight."""
    tensors = (weight.codes, weight.groups, weight.zeros, weight.owners)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def time_kept(shape: tuple[int, int], bits: int, dense: Any, bandwidth: float) -> list[dict[str, Any]]:
    """One row for each number of tokens. dense: makes a prepared dense weight of a shape and a code width."""
    from quantc.kernels.cuda.dense import CUDA_PACKED
    from quantc.kernels.cuda.kept import CUDA_KEPT

    n, k = shape
    weight = random_kept(shape, bits)
    size = prepared_bytes(weight)
    kept = [weight, *(random_kept(shape, bits) for _ in range(copies_for(size) - 1))]
    uneven = [random_kept(shape, bits, uneven=True) for _ in kept]
    packed = [dense(shape, bits) for _ in range(copies_for(n * k * bits // 8))]
    rows = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").half()
        own = seconds(lambda turn, x=x: CUDA_KEPT.run(x, kept[turn]), len(kept))
        halves = seconds(lambda turn, x=x: CUDA_KEPT.run(x, uneven[turn]), len(uneven))
        usual = seconds(lambda turn, x=x: CUDA_PACKED.run(x, packed[turn]), len(packed))
        rows.append({
            "N": n, "K": k, "bits": bits, "M": m, "us": own * 1e6, "dense_us": usual * 1e6, "ratio": usual / own,
            "of_copy_bandwidth": size / own / bandwidth, "uneven_us": halves * 1e6,
        })  # fmt: skip
    return rows


def measure_kept_crossover(shapes: tuple[tuple[int, int], ...], bits: int) -> dict[str, int]:
    """For each shape: the first of TOKENS from which unpacking the weight is the faster way."""
    from quantc.kernels.cuda import kept

    found, chosen = {}, kept.KEPT_FROM
    try:
        for shape in shapes:
            weights = [random_kept(shape, bits) for _ in range(4)]
            for m in TOKENS:
                x = torch.randn(m, shape[1], device="cuda").half()
                times = []
                for limit in (m + 1, m):
                    kept.KEPT_FROM = limit
                    times.append(seconds(lambda turn, x=x, w=weights: kept.CUDA_KEPT.run(x, w[turn]), 4))
                if times[1] < times[0]:
                    found["x".join(map(str, shape))] = m
                    break
    finally:
        kept.KEPT_FROM = chosen
    return found


def kept_verdict(rows: list[dict[str, Any]], bits: int, large: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """The target beside the worst of the large shapes."""
    chosen = [row for row in rows if row["bits"] == bits and row["M"] == 1 and (row["N"], row["K"]) in large]
    worst = min(row["ratio"] for row in chosen)
    name = f"M = 1, {SPARSITY:.0%} of the groups dropped, x dense"
    return {"target": name, "at least": DENSE_TARGET, "worst": f"{worst:.2f}", "holds": worst >= DENSE_TARGET}
