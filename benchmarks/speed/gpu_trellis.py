"""Times the CUDA kernels of weights in trellis codes for `benchmarks.gpu`: products, and the search.

Products beside the packed matmul of 4 bits in groups of 128 and the vendor's float16 matmul. Operands take turns, so
that no cache serves them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.gpu_timing import copies_for, seconds, wall_seconds

WIDTHS = (2, 3, 4)
TOKENS = (1, 4, 16, 64, 1024)
GRID_BITS = 4
SEARCHED = (4096, 14336)  # rows: fewer tiles than an H200 has room for in a sweep, and more
SEARCHED_COLUMNS = 512


def random_tensor(spec: Any, shape: tuple[int, int]) -> Any:
    """A weight of random walks, which cost no search."""
    from quantc.numerics.qtensor import QTensor
    from quantc.numerics.trellis import unpack_states
    from quantc.spec import tile_of

    n, k = shape
    tile, generator = tile_of(n), torch.Generator().manual_seed(0)
    size = (-(-n // tile), k, tile * spec.bits // 8)
    walks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    scales = ((0.5 + torch.rand(n, 1, generator=generator)) / 37).half()
    return QTensor(spec, unpack_states(walks, spec.bits, n), scales)


def random_walks(shape: tuple[int, int], bits: int) -> Any:
    """A prepared weight of random walks: no time depends on what they are."""
    from quantc.formats import DENSE
    from quantc.kernels.cuda.trellis_layout import prepare

    parts = {
        name: torch.randint(0, 256, part.shape, dtype=torch.uint8, device="cuda")
        if part.dtype == torch.uint8
        else torch.full(part.shape, 1e-3, dtype=part.dtype, device="cuda")
        for name, part in DENSE.layout(trellis(bits), shape).items()
    }
    return prepare(parts, trellis(bits), shape)


def trellis(bits: int) -> Any:
    """The spec of trellis codes of a width."""
    from quantc.spec import WHOLE_ROW, QuantSpec

    return QuantSpec(bits, WHOLE_ROW, code="trellis")


def time_trellis(shape: tuple[int, int], bits: int, grid: Any, bandwidth: float) -> list[dict[str, Any]]:
    """One row for each number of tokens. grid: makes a prepared weight of uniform codes of a shape and a code width."""
    from quantc.kernels.cuda.dense import CUDA_PACKED
    from quantc.kernels.cuda.trellis import CUDA_TRELLIS

    n, k = shape
    size = n * k * bits // 8
    walks = [random_walks(shape, bits) for _ in range(copies_for(size))]
    packed = [grid(shape, GRID_BITS) for _ in range(copies_for(n * k * GRID_BITS // 8))]
    dense = [torch.randn(n, k, device="cuda").half() for _ in range(copies_for(2 * n * k))]
    rows = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").half()
        own = seconds(lambda turn, x=x: CUDA_TRELLIS.run(x, walks[turn]), len(walks))
        usual = seconds(lambda turn, x=x: CUDA_PACKED.run(x, packed[turn]), len(packed))
        vendor = seconds(lambda turn, x=x: x @ dense[turn].T, len(dense))
        rows.append({
            "N": n, "K": k, "bits": bits, "M": m, "us": own * 1e6, f"grid{GRID_BITS}_us": usual * 1e6,
            "vendor_us": vendor * 1e6, "ratio": vendor / own, "weights_per_second": n * k / own,
            "of_copy_bandwidth": size / own / bandwidth,
        })  # fmt: skip
    return rows


def time_search() -> list[dict[str, Any]]:
    """Weights per second that are rounded to nearest, and in a GPTQ sweep."""
    from quantc.kernels.cuda.gptq import panel_for
    from quantc.numerics.grids import fit_grid
    from quantc.numerics.rounding import factorize, gptq, round_to_nearest

    panel = panel_for(torch.device("cuda", torch.cuda.current_device()))
    assert panel is not None
    rows, columns = [], SEARCHED_COLUMNS
    for n, bits in ((n, bits) for n in SEARCHED for bits in WIDTHS):
        weight, spec = torch.randn(n, columns, device="cuda"), trellis(bits)
        x = torch.randn(2 * columns, columns, device="cuda")
        factor, grid = factorize(x.T @ x), fit_grid(weight, spec)
        near = wall_seconds(lambda w=weight, g=grid, s=spec: round_to_nearest(w, g, s, panel))
        sweep = wall_seconds(lambda w=weight, f=factor, g=grid, s=spec: gptq(w, f, g, s, panel))
        rows.append({
            "N": n, "K": columns, "bits": bits, "nearest_weights_per_second": n * columns / near,
            "sweep_weights_per_second": n * columns / sweep,
        })  # fmt: skip
    return rows
