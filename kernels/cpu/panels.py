"""Weights that the library unpacks a panel of rows at a time, for torch's matmul; and their low-rank additions."""

from __future__ import annotations

from math import ceil
from typing import Protocol

import torch
from torch.nn import functional as F

from ...numerics.hadamard import rotate_back
from . import rotation
from .images import STRIP

# Rows of W unpacked at once, 1 MiB of bfloat16 at 4096 inputs: in wide panels every input is in a page of its own, and
# writing them takes 20 times as long.
PANEL_ROWS = 128


class Unpacked(Protocol):
    """A prepared weight (N, K). low_rank_a, low_rank_b: float16 (R, K) and (ceil(N / 16), R, 16), or None."""

    n: int
    k: int
    low_rank_a: torch.Tensor | None
    low_rank_b: torch.Tensor | None
    hadamard: int

    @property
    def panel_step(self) -> int:
        """Panels start at multiples of this many rows."""

    def panel(self, room: torch.Tensor, rows: int) -> torch.Tensor:
        """Return a view (K, rows) of room, in the order that unpack writes."""

    def unpack(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Unpack rows [start, stop) of W into out (K, stop - start), a panel."""


def panels(w: Unpacked) -> list[tuple[int, int]]:
    """Return the first row of each panel, and that after its last."""
    rows = max(1, PANEL_ROWS // w.panel_step) * w.panel_step
    return [(start, min(start + rows, w.n)) for start in range(0, w.n, rows)]


def multiply_panels(x: torch.Tensor, w: Unpacked, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Write x (M, K) times W^T plus bias to y (M, N) by torch's matmul."""
    x = rotation.rotate(x, w.hadamard, torch.get_num_threads()) if w.hadamard else x
    parts = panels(w)
    room = x.new_empty(w.k * (parts[0][1] - parts[0][0]))
    for start, stop in parts:
        panel = w.panel(room, stop - start)
        w.unpack(start, stop, panel)
        if bias is None:
            torch.mm(x, panel, out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(x.dtype), x, panel, out=y[:, start:stop])
    if w.low_rank_a is not None:
        a, b = _factors(w, x.dtype)
        y += F.linear(F.linear(x, a), b)


def multiply_back(y: torch.Tensor, w: Unpacked) -> torch.Tensor:
    """Return y (..., N) times W (N, K), low-rank addition and rotation included, in y's dtype: a gradient at x.

    W is unpacked a panel at a time, and the products of panels are added up in float32.
    """
    rows = y.reshape(-1, w.n)
    x = torch.zeros(len(rows), w.k, dtype=torch.float32)
    parts = panels(w)
    room = rows.new_empty(w.k * (parts[0][1] - parts[0][0]))
    for start, stop in parts:
        panel = w.panel(room, stop - start)
        w.unpack(start, stop, panel)
        x += rows[:, start:stop] @ panel.T
    if w.low_rank_a is not None:
        a, b = _factors(w, y.dtype)
        x += rows @ b @ a
    x = rotate_back(x, w.hadamard) if w.hadamard else x
    return x.to(y.dtype).view(*y.shape[:-1], w.k)


def _factors(w: Unpacked, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low-rank factors a (R, K) and b (N, R)."""
    assert w.low_rank_a is not None
    assert w.low_rank_b is not None
    return w.low_rank_a.to(dtype), w.low_rank_b.transpose(1, 2).flatten(0, 1)[: w.n].to(dtype)


def check_low_rank(a: torch.Tensor | None, b: torch.Tensor | None, n: int, k: int) -> None:
    """Raise ValueError unless low-rank factors, where there are any, are those of a weight (N, K)."""
    if a is None or b is None:
        return
    needed = (a.shape[0], k), (ceil(n / STRIP), a.shape[0], STRIP)
    for factor, shape in zip((a, b), needed, strict=True):
        found = factor.shape, factor.dtype, factor.device.type
        if found != (shape, torch.float16, "cpu") or not factor.is_contiguous():
            raise ValueError(f"a low-rank factor must be contiguous {shape} float16 on the CPU, and is {found}.")


def weight_addresses(w: Unpacked, stored: int) -> tuple[int, int, int, int, int]:
    """Return Weight of native/weight.h; stored: the address of what the weight itself is read from."""
    tables = rotation.rotation(w.k, w.hadamard).address if w.hadamard else 0
    a, b = w.low_rank_a, w.low_rank_b
    factors = (0, 0, 0) if a is None or b is None else (a.data_ptr(), b.data_ptr(), a.shape[0])
    return (stored, tables, *factors)
