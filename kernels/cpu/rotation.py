"""Rotations as the C++ library takes them (Rotation in native/weight.h); numerics/hadamard.py defines what they do."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from ...numerics.hadamard import base_order, hadamard_matrix, rotation_signs
from . import library

WORD = 16  # inputs whose signs share a word


class Tables(ctypes.Structure):
    """Rotation of native/weight.h."""

    _fields_ = (
        ("width", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("base", ctypes.c_int64),
        ("signs", ctypes.c_void_p),
        ("quarters", ctypes.c_void_p),
        ("scale", ctypes.c_float),
    )


class Rotation:
    """The tables for rows of a width that rotate in blocks of an order. address: where the library finds them."""

    def __init__(self, width: int, block: int):
        base = base_order(block)
        assert base is not None, block
        self._signs, self._quarters = sign_words(width, block), quarters(base)
        addresses = self._signs.ctypes.data, self._quarters.ctypes.data
        self._tables = Tables(width, block, base, *addresses, block**-0.5)
        self.address = ctypes.addressof(self._tables)


@functools.cache
def rotation(width: int, block: int) -> Rotation:
    """Return the tables of a width, a multiple of the block; the library reads them, so the process keeps them."""
    made = Rotation(width, block)
    library.loaded().keep_rotation(made.address)
    return made


def sign_words(width: int, block: int) -> np.ndarray:
    """Return uint8 (2 ceil(width / 16),): bit i % 8 of byte i // 8 is set where input i changes its sign."""
    negative = np.zeros(-(-width // WORD) * WORD, dtype=bool)
    negative[:width] = rotation_signs(width, block).numpy() < 0
    return np.packbits(negative, bitorder="little")


@functools.cache
def quarters(base: int) -> np.ndarray:
    """Return uint8 (base, base // 4), bit b of (i, g) set where H_base[4 g + b, i] is -1: one look-up for 4 inputs."""
    negative = (hadamard_matrix(base) < 0).numpy().T
    four = negative[:, : base // 4 * 4].reshape(base, -1, 4)
    return np.ascontiguousarray((four << np.arange(4)).sum(2), dtype=np.uint8)


def rotate(x: torch.Tensor, block: int, threads: int) -> torch.Tensor:
    """Return x (..., K) of a dtype in library.TYPES, on the CPU, rotated as rotate in numerics/hadamard.py does."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    address, rows = rotation(width, block).address, x.numel() // width
    library.loaded().rotate(address, x.data_ptr(), out.data_ptr(), rows, library.TYPES[x.dtype], threads)
    return out
