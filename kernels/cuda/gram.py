"""H += X^T X on tensor cores: gram.cu's programs and launches."""

from __future__ import annotations

import torch

from .launch import launch
from .program import Budget, Launch, Program

TYPES = {torch.float16: "Half", torch.bfloat16: "Bfloat"}
STEP_ROWS = 32
# Tiles of 128 read X half as often as those of 64; below this width there are fewer of them than multiprocessors.
WIDE = 2048
# Tensor cores cut the sums they carry on: over m rows that is up to m / 16 * 2^-23 of each. Past these rows another
# launch adds to H, which rounds.
MOST_ROWS = 4096
ALIGNMENT = 16  # bytes of one copy
MULTIPLE = 8  # of values: rows then are aligned too


def supports(width: int, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why rows of a width and dtype are not taken; arch: such as 80 for sm_80."""
    if dtype not in TYPES:
        return f"multiplies float16 and bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and arch < 80:
        return "multiplies bfloat16 from compute capability 8.0 on"
    if width % MULTIPLE:
        return f"needs a width that is a multiple of {MULTIPLE}, and {width} is not"
    return None


def programs() -> dict[Program, Budget]:
    """Every variant that `gram_launch` can ask for."""
    return {
        _program(dtype, tile): Budget(
            registers=144 if tile == 128 else 112,
            shared_bytes=0,
            minimum_arch=80 if dtype == torch.bfloat16 else 75,
            everyday=dtype == torch.float16,
        )
        for dtype in TYPES
        for tile in (64, 128)
    }


def gram_launch(x: torch.Tensor, h: torch.Tensor) -> Launch:
    """h (K, K) float32 += x^T x on and above the diagonal, for x (M, K) float16 or bfloat16; both contiguous.

    Below the diagonal h is changed in some places and means nothing. The same x and h always give the same result.
    Raises ValueError for tensors that the kernel does not take.
    """
    _check(x, h)
    rows, width = x.shape
    tile = 128 if width >= WIDE else 64
    tiles = -(-width // tile)
    return Launch(
        program=_program(x.dtype, tile),
        grid=(tiles * (tiles + 1) // 2, 1, 1),
        block=(2 * tile, 1, 1),
        shared=2 * 2 * STEP_ROWS * tile * 2,
        arguments=(x, h, rows, width),
    )


def add_gram(x: torch.Tensor, h: torch.Tensor) -> None:
    """Run `gram_launch` on the GPU that x (M, K) and h lie on, MOST_ROWS rows at a time."""
    for rows in x.split(MOST_ROWS):
        launch(gram_launch(rows, h))


def _program(dtype: torch.dtype, tile: int) -> Program:
    return Program("gram.cu", "gram", (("TYPE", TYPES[dtype]), ("TILE", tile)))


def _check(x: torch.Tensor, h: torch.Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        raise ValueError(f"x {tuple(x.shape)} must be contiguous (M, K) that begins at a multiple of {ALIGNMENT} bytes")
    reason = supports(x.shape[1], x.dtype, arch=80)
    if reason is not None:
        raise ValueError(f"the kernel {reason}")
    if h.shape != (x.shape[1], x.shape[1]) or h.dtype != torch.float32 or not h.is_contiguous():
        raise ValueError(f"h must be contiguous float32 (K, K), and is {tuple(h.shape)} {h.dtype} for K = {x.shape[1]}")
