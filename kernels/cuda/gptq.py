"""The GPTQ sweep over a panel of columns on a GPU: gptq.cu's programs and launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .program import Budget, Launch, Program

PANELS = (32, 64, 128)  # columns a program can hold in registers
REGISTERS = {32: 80, 64: 128, 128: 192}
THREADS = 64  # output channels of a thread block
# What a sweep should ask for: the work of a panel grows with its columns, the number of matrix products between
# panels falls with them.
BEST_COLUMNS = 64


@dataclass(frozen=True)
class Columns:
    """The state of a sweep over weight (N, K), transposed, rows in rounding order; contiguous, on one device.

    left: float32 (K, N), what is still to be rounded, with the errors of all columns before the panel fed in.
    upper: float32 (K, K), upper Cholesky factor of the inverse Gram matrix. scales, zeros: float32 (R, N).
    row_of: int32 (K,), the row of scales and zeros that each column uses. top: the largest code.
    codes: uint8 (K, N) and errors: float32 (K, N) are written: each error is over its pivot, upper[k, k].
    """

    left: torch.Tensor
    upper: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    row_of: torch.Tensor
    codes: torch.Tensor
    errors: torch.Tensor
    top: int

    def __post_init__(self) -> None:
        """Raises ValueError for tensors that the kernel would read or write wrongly."""
        k, n = self.left.shape
        r = self.scales.shape[0]
        needed = {
            "left": ((k, n), torch.float32),
            "upper": ((k, k), torch.float32),
            "scales": ((r, n), torch.float32),
            "zeros": ((r, n), torch.float32),
            "row_of": ((k,), torch.int32),
            "codes": ((k, n), torch.uint8),
            "errors": ((k, n), torch.float32),
        }
        for name, (shape, dtype) in needed.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} must be contiguous {shape} {dtype}, and is {found} {tensor.stride()}")


def programs() -> dict[Program, Budget]:
    """Every variant that `panel_launch` can ask for."""
    return {_program(panel): Budget(REGISTERS[panel], 0, everyday=panel == BEST_COLUMNS) for panel in PANELS}


def panel_launch(columns: Columns, low: int, high: int) -> Launch:
    """Round columns [low, high): writes those rows of codes and errors. Nothing is fed into columns from high on.

    Raises ValueError for a panel that is empty, outside the weight, or wider than the largest of PANELS.
    """
    k, n = columns.left.shape
    if not 0 <= low < high <= min(k, low + PANELS[-1]):
        raise ValueError(f"a panel has 1 to {PANELS[-1]} of {k} columns, not [{low}, {high})")
    panel = next(panel for panel in PANELS if high - low <= panel)
    tensors = (columns.left, columns.upper, columns.scales, columns.zeros, columns.row_of, columns.codes, columns.errors)
    return Launch(
        program=_program(panel),
        grid=(-(-n // THREADS), 1, 1),
        block=(THREADS, 1, 1),
        shared=panel * panel * 4,
        arguments=(*tensors, n, k, low, high - low, float(columns.top)),
    )


def round_panel(columns: Columns, low: int, high: int) -> None:
    """Run `panel_launch` on the GPU that the tensors lie on."""
    from .launch import launch

    launch(panel_launch(columns, low, high))


def _program(panel: int) -> Program:
    return Program("gptq.cu", "gptq_panel", (("PANEL", panel),))
