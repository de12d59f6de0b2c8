"""Matrices of codes in a dtype of their own, 8-bit floats or integers, times the scales of their blocks."""

from __future__ import annotations

from functools import partial
from itertools import product
from math import ceil

import torch

from ...errors import ModelError
from .base import Packed, Parts
from .codes import Blocks, dequantize, to_float
from .stored import Shape, Stored

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
Block = tuple[int, int]


def scaled_tensor(stored: Stored, name: str, scales: str, block: Block, zeros: str | None = None) -> Packed:
    """Return what codes (..., N, K) and scales stand for: of blocks (..., R, C), of rows, or one for all.

    block: sides of a block, 0 for the whole side. zeros: the tensor that is subtracted first, where there is one.
    Raises ModelError.
    """
    header = stored.headers[name]
    if len(header.shape) < 2:
        raise ModelError(
            f"{stored.folder}: {name} is {header.dtype} of the shape {header.shape}, but only matrices are read in it; "
            "start from the original, unquantized model."
        )
    (*lead, n, k) = header.shape
    sides = (block[0] or n, block[1] or k)
    grid = (*lead, ceil(n / sides[0]), ceil(k / sides[1]))
    rows: list[Shape] = [(*lead, n, 1), (n,)] if not lead else [(*lead, n, 1)]
    one: list[Shape] = [(*lead, 1, 1)] if lead else [(1, 1), (1,), ()]
    stored.part(scales, SCALES, name)
    stored.check_shape(scales, [grid, *rows, *one])
    parts = {"codes": name, "scales": scales}
    if zeros is not None:
        stored.part(zeros, ("I8", "I32", "F32"), name)
        stored.check_shape(zeros, [stored.headers[scales].shape])
        parts["zeros"] = zeros
    in_blocks = stored.headers[scales].shape == grid and grid[-2:] not in ((1, 1), (n, 1))
    label = _kind(header.dtype) + (f" {_sides(sides)}" if in_blocks else "")
    return Packed(name, header.shape, parts, label, partial(_decode, grid, sides))


def _kind(dtype: str) -> str:
    return "int8" if dtype == "I8" else f"fp8 {dtype.removeprefix('F8_').lower()}"


def _sides(sides: Block) -> str:
    return f"g{sides[1]}" if sides[0] == 1 else f"{sides[0]}x{sides[1]}"


def _decode(grid: Shape, sides: Block, parts: Parts) -> torch.Tensor:
    """Return (codes - zeros) * scales, matrix by matrix; see Packed."""
    codes = parts["codes"]
    values = torch.empty(codes.shape)
    found = {role: _in_grid(parts[role], grid) for role in parts if role != "codes"}
    for place in product(*map(range, codes.shape[:-2])):
        zeros = _blocks(found["zeros"][place].float(), sides, codes) if "zeros" in found else None
        scales = _blocks(to_float(found["scales"][place]), sides, codes)
        values[place] = dequantize((codes.shape[-2], codes.shape[-1]), partial(_rows, codes[place]), scales, zeros)
    return values


def _in_grid(found: torch.Tensor, grid: Shape) -> torch.Tensor:
    """Return scales of which those of a whole tensor or of rows are (R, C) too."""
    return found if found.ndim == len(grid) else found.reshape(-1, 1)


def _blocks(found: torch.Tensor, sides: Block, codes: torch.Tensor) -> Blocks:
    """Return the scales of a matrix; those of rows are of blocks with one row."""
    n, k = codes.shape[-2:]
    return Blocks(found, (1, k) if found.shape == (n, 1) else sides, k)


def _rows(codes: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return codes[start:stop]
