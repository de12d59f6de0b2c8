"""Products of every kind of weight by the CUDA kernels against float64, for `benchmarks.gpu`."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.gpu_trellis import random_tensor, trellis

CHECK_SHAPE = (1000, 1600)
CHECK_TOKENS = (1, 5, 16, 33, 64, 200, 700)


def check_products() -> list[dict[str, Any]]:
    """Largest error against float64 in units of what rounding weights and result to the dtype allows."""
    from quantc.formats import format_of
    from quantc.kernels.registry import choose
    from quantc.spec import SPARSE_GROUPS, WHOLE_ROW, QuantSpec

    cases = [
        QuantSpec(bits, group, grouping, symmetric)  # type: ignore[arg-type]
        for bits in (2, 3, 4, 5, 6, 8)
        for group, grouping in ((32, "per_oc"), (128, "per_oc"), (WHOLE_ROW, "per_oc"), (16, "per_ic"), (64, "per_ic"))
        for symmetric in (False, True)
    ]
    cases += [QuantSpec(bits, group, sparsity=0.5) for bits in (2, 3, 4, 5, 6, 8) for group in SPARSE_GROUPS]
    cases += [trellis(bits) for bits in (1, 2, 3, 4, 5)]
    rows = []
    for spec in cases:
        tensor = _checked_tensor(spec)
        parts = {name: part.cuda() for name, part in format_of(spec).pack(tensor).items()}
        matrix = tensor.effective_weight().double().cuda()
        for dtype in (torch.float16, torch.bfloat16):
            kernel = choose(spec, CHECK_SHAPE, torch.device("cuda"), dtype).kernel
            prepared = kernel.prepare(parts, spec, CHECK_SHAPE, dtype)
            worst = 0.0
            for m in CHECK_TOKENS:
                x = torch.randn(m, CHECK_SHAPE[1], device="cuda").to(dtype)
                allowed = 2 * torch.finfo(dtype).eps * (x.double().abs() @ matrix.abs().T + 1)
                error = (kernel.run(x, prepared).double() - x.double() @ matrix.T).abs()
                worst = max(worst, float((error / allowed).max()))
            rows.append({"spec": spec.label(), "dtype": str(dtype)[6:], "kernel": kernel.name, "worst": worst})
    return rows


def _checked_tensor(spec: Any) -> Any:
    """A normal weight of CHECK_SHAPE."""
    from benchmarks.speed.cpu_sparse import drop
    from quantc.numerics.grids import fit_grid
    from quantc.numerics.qtensor import QTensor
    from quantc.numerics.rounding import round_to_nearest

    if spec.code == "trellis":
        return random_tensor(spec, CHECK_SHAPE)
    weight = torch.randn(CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight, spec)
    tensor = QTensor(spec, round_to_nearest(weight, grid, spec), grid.scales, grid.zeros)
    return drop(tensor, spec) if spec.sparsity else tensor
