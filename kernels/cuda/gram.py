"""H += X^T X on tensor cores: gram.cu's programs, launches, and what calibration can use of them."""

from __future__ import annotations

import torch

from .device import architecture, device_index
from .launch import launch, refusal
from .program import Budget, Launch, Program

TYPES = {torch.float16: "Half", torch.bfloat16: "Bfloat"}
STEP_ROWS = 32
TILES = (64, 128)
# Tiles of 128 read X half as often as those of 64; below this width there are fewer of them than multiprocessors.
WIDE = 2048
# Tensor cores cut the sums they carry on: over m rows that is up to m / 16 * 2^-23 of each. Past these rows another
# launch adds to H, which rounds.
MOST_ROWS = 4096
ALIGNMENT = 16  # bytes of one copy
MULTIPLE = 8  # of values: rows then are aligned too


def supports(width: int, dtype: torch.dtype, arch: int) -> str | None:
    """Return None, or why rows of a width and dtype are not taken; arch: such as 80 for sm_80."""
    if dtype not in TYPES:
        return f"multiplies float16 and bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and arch < 80:
        return "multiplies bfloat16 from compute capability 8.0 on"
    if width % MULTIPLE:
        return f"needs a width that is a multiple of {MULTIPLE}, and {width} is not"
    return None


def programs() -> dict[Program, Budget]:
    """Return every variant that `gram_launch` can ask for."""
    return {
        _program(dtype, tile): Budget(
            registers=144 if tile == 128 else 112,
            shared_bytes=0,
            minimum_arch=80 if dtype == torch.bfloat16 else 75,
            everyday=dtype == torch.float16,
        )
        for dtype in TYPES
        for tile in TILES
    }


def gram_launch(x: torch.Tensor, h: torch.Tensor) -> Launch:
    """Return the launch of h (K, K) float32 += x^T x on and above the diagonal, for x (M, K) float16 or bfloat16.

    Both are contiguous. Below the diagonal h is changed in some places and means nothing. The same x and h always give
    the same result. Raises ValueError for tensors that the kernel does not take.
    """
    _check(x, h)
    rows, width = x.shape
    tile = TILES[width >= WIDE]
    tiles = -(-width // tile)
    return Launch(
        program=_program(x.dtype, tile),
        grid=(tiles * (tiles + 1) // 2, 1, 1),
        block=(2 * tile, 1, 1),
        shared=_shared(tile),
        arguments=(x, h, rows, width),
    )


class Bfloat16Products:
    """Adds Gram matrices of float32 rows rounded to bfloat16, as calibration's own products round them if in bfloat16.

    Rounding adds about (2^-9)^2 / 12 of each diagonal entry, a share of 3e-7, and the damping adds 1e-2. The output
    error of GPTQ on 256 x 512 weights at 3 and 4 bits moved by less than 0.2 %, up as often as down.
    """

    def __call__(self, rows: torch.Tensor, upper: torch.Tensor) -> bool:
        """See AddProducts in quantc/numerics/statistics.py."""
        if rows.shape[1] % MULTIPLE:
            return False
        add_gram(rows.to(torch.bfloat16).contiguous(), upper)
        return True


def products_for(device: torch.device) -> Bfloat16Products | None:
    """Return what Gram matrices on a device take: None where it has no such kernel, and torch does it in float32."""
    if device.type != "cuda" or any(refusal(_program(torch.bfloat16, tile), device, _shared(tile)) for tile in TILES):
        return None
    arch = int(architecture(device_index(device)).removeprefix("sm_"))
    return Bfloat16Products() if supports(MULTIPLE, torch.bfloat16, arch) is None else None


def add_gram(x: torch.Tensor, h: torch.Tensor) -> None:
    """Run `gram_launch` on the GPU that holds x (M, K) and h, MOST_ROWS rows at a time."""
    for rows in x.split(MOST_ROWS):
        launch(gram_launch(rows, h))


def _program(dtype: torch.dtype, tile: int) -> Program:
    return Program("gram.cu", "gram", (("TYPE", TYPES[dtype]), ("TILE", tile)))


def _shared(tile: int) -> int:
    """Return the bytes of two bands of 16-bit values, twice."""
    return 2 * 2 * STEP_ROWS * tile * 2


def _check(x: torch.Tensor, h: torch.Tensor) -> None:
    if x.dim() != 2 or not x.is_contiguous() or x.data_ptr() % ALIGNMENT:
        raise ValueError(f"x {tuple(x.shape)} must be contiguous (M, K) that begins at a multiple of {ALIGNMENT} bytes")
    reason = supports(x.shape[1], x.dtype, arch=80)
    if reason is not None:
        raise ValueError(f"the kernel {reason}")
    if h.shape != (x.shape[1], x.shape[1]) or h.dtype != torch.float32 or not h.is_contiguous():
        raise ValueError(f"h must be contiguous float32 (K, K), and is {tuple(h.shape)} {h.dtype} for K = {x.shape[1]}")
