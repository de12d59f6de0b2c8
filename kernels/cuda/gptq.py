"""The GPTQ sweep over a panel of columns on a GPU: gptq.cu's programs, launches, and the panel that `gptq` can use.

Trellis codes have a program of their own: trellis_panel.py.
"""

from __future__ import annotations

import torch

from ...numerics.grids import Columns, TrellisColumns, UniformColumns
from ...numerics.rounding import Sweep
from . import trellis_panel
from .launch import launch, refusal
from .program import Budget, Launch, Program

PANELS = (32, 64, 128)  # columns a program can hold in registers
REGISTERS = {32: 80, 64: 128, 128: 192}
THREADS = 64  # output channels of a thread block
# The work of a panel grows with the square of its columns, the matrix products between panels get fewer with them.
BEST_COLUMNS = 64


class CudaPanel:
    """Rounds panels of sweeps on a GPU, one launch each."""

    columns = BEST_COLUMNS

    def takes(self, columns: Columns) -> bool:
        """See Panel in numerics/rounding.py: uniform grids, and trellis codes where their program runs."""
        if type(columns) is TrellisColumns:
            shared = trellis_panel.shared_bytes(trellis_panel.LARGEST_TILE)
            return refusal(trellis_panel.program(columns.bits), columns.scales.device, shared) is None
        return type(columns) is UniformColumns

    def nearest(self, columns: Columns, values: torch.Tensor) -> torch.Tensor:
        """See Panel: for trellis codes alone."""
        codes = torch.empty_like(values, dtype=columns.code_dtype)
        launch(trellis_panel.nearest_launch(columns, values, codes))
        return codes

    def round(self, sweep: Sweep, low: int, high: int) -> None:
        """See Panel."""
        trellis = type(sweep.columns) is TrellisColumns
        launch((trellis_panel.panel_launch if trellis else panel_launch)(sweep, low, high))


def panel_for(device: torch.device) -> CudaPanel | None:
    """Return the panel for weights on a device: None where it has no kernels, and torch does it all."""
    if device.type != "cuda" or any(refusal(_program(size), device, _shared(size)) for size in PANELS[:2]):
        return None
    return CudaPanel()


def programs() -> dict[Program, Budget]:
    """Return every variant that `panel_launch` can ask for."""
    return {_program(size): Budget(REGISTERS[size], 0, everyday=size == BEST_COLUMNS) for size in PANELS}


def panel_launch(sweep: Sweep, low: int, high: int) -> Launch:
    """Fill in codes and errors of columns [low, high) of a sweep. Nothing is fed into columns from high on.

    Raises ValueError for a panel that is empty, outside the weight, or wider than the largest of PANELS, and for
    tensors that the kernel would read or write wrongly.
    """
    found = _checked(sweep)
    k, n = sweep.left.shape
    if not 0 <= low < high <= min(k, low + PANELS[-1]):
        raise ValueError(f"a panel has 1 to {PANELS[-1]} of {k} columns, not [{low}, {high})")
    size = next(size for size in PANELS if high - low <= size)
    tensors = tuple(found.values())
    return Launch(
        program=_program(size),
        grid=(-(-n // THREADS), 1, 1),
        block=(THREADS, 1, 1),
        shared=_shared(size),
        arguments=(*tensors, n, *sweep.upper.stride(), low, high - low, float(_uniform(sweep).top)),
    )


def _program(size: int) -> Program:
    return Program("gptq.cu", "gptq_panel", (("PANEL", size),))


def _shared(size: int) -> int:
    """Return the bytes for the panel's part of the factor."""
    return size * size * 4


def _uniform(sweep: Sweep) -> UniformColumns:
    assert isinstance(sweep.columns, UniformColumns)
    return sweep.columns


def _checked(sweep: Sweep) -> dict[str, torch.Tensor]:
    """Return the kernel's tensors in the order of its arguments."""
    (k, n), columns = sweep.left.shape, _uniform(sweep)
    r = columns.scales.shape[0]
    needed = {
        "left": ((k, n), torch.float32),
        "upper": ((k, k), torch.float32),
        "scales": ((r, n), torch.float32),
        "zeros": ((r, n), torch.float32),
        "rows": ((k,), torch.int32),
        "codes": ((k, n), torch.uint8),
        "errors": ((k, n), torch.float32),
    }
    found = {name: getattr(columns if name in ("scales", "zeros", "rows") else sweep, name) for name in needed}
    for name, (shape, dtype) in needed.items():
        tensor = found[name]
        strided = name != "upper" and not tensor.is_contiguous()
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or strided:
            actual = f"{tuple(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"
            raise ValueError(f"{name} must be contiguous {shape} {dtype}, and is {actual}")
    return found
