"""Launches for weights in trellis codes: products with few tokens, and the unpacked weight for all others."""

from __future__ import annotations

from itertools import product
from math import ceil

import torch

from .packed import ELEMENTS, X_STEP, Device, Product, Workspace, best_splits
from .program import Budget, Launch, Program
from .trellis_layout import TrellisWeight

TRELLIS_ELEMENTS = {**ELEMENTS, torch.float32: "Float"}
WIDTHS = (1, 2, 3, 4, 5)
TILES = (64, 96, 80, 48, 32)  # those of quantc/spec/grids/trellis.py

DECODE_TILE = 64
DECODE_TOKENS = (8, 16)
DECODE_WARPS, DECODE_STAGES = 8, 4
CHUNK = 32  # inputs
TOKEN_STRIDE = 68  # as in include/finish.cuh
DEQUANTIZE_WARPS = 8
OLDEST = {torch.float16: 75, torch.bfloat16: 80, torch.float32: 80}  # float32 is multiplied as bfloat16


def decodes(tile: int, k: int) -> bool:
    """Return whether there is a program for few tokens that multiplies by the walks of tiles themselves."""
    return tile == DECODE_TILE and k % X_STEP == 0


def decode_launch(wanted: Product[TrellisWeight], device: Device, workspace: Workspace) -> Launch:
    """Return the launch that computes y for at most 16 tokens, of weights that `decodes` is for."""
    m, weight = wanted.x.shape[0], wanted.weight
    (n, k), tiles = weight.shape, weight.walks.shape[0]
    tokens = next(count for count in DECODE_TOKENS if m <= count)
    room = workspace.partial.numel() // (tiles * tokens * DECODE_TILE)
    splits = best_splits(tiles, ceil(k / CHUNK), DECODE_WARPS, device.multiprocessors, room)
    rank = 0 if wanted.low_rank_t is None else wanted.low_rank_t.shape[1]
    tensors = (weight.walks, weight.scales, wanted.x, wanted.y, wanted.bias)
    extras = (weight.low_rank_b, wanted.low_rank_t, workspace.partial, workspace.counters)
    program = decode_program(weight.bits, wanted.x.dtype, tokens)
    block, shared = (32 * DECODE_WARPS, 1, 1), decode_shared(weight.bits, tokens)
    return Launch(program, (tiles, splits, 1), block, shared, (*tensors, *extras, m, n, k, rank))


def dequantize_launch(weight: TrellisWeight, out: torch.Tensor) -> Launch:
    """Return the launch that writes the weight (N, K) itself, as out's dtype."""
    n, k = weight.shape
    program = dequantize_program(weight.bits, weight.tile, out.dtype)
    grid = (ceil(k / 32), weight.walks.shape[0], 1)
    return Launch(program, grid, (32 * DEQUANTIZE_WARPS, 1, 1), 0, (weight.walks, weight.scales, out, n, k))


def decode_program(bits: int, dtype: torch.dtype, tokens: int) -> Program:
    """Return trellis_decode.cu for up to `tokens` tokens, one of DECODE_TOKENS."""
    shape = {"TOKENS": tokens, "WARPS": DECODE_WARPS, "STAGES": DECODE_STAGES}
    defines = (("ELEMENT", TRELLIS_ELEMENTS[dtype]), ("BITS", bits), *shape.items())
    return Program("trellis_decode.cu", "trellis_decode", defines)


def decode_shared(bits: int, tokens: int) -> int:
    """Return the bytes of the warps' chunks, later overlaid by their sums."""
    slot = CHUNK // 8 * (DECODE_TILE * bits + 32)
    return DECODE_WARPS * max(DECODE_STAGES * slot, tokens * TOKEN_STRIDE * 4)


def dequantize_program(bits: int, tile: int, dtype: torch.dtype) -> Program:
    """Return trellis_dequantize.cu."""
    defines = (("ELEMENT", TRELLIS_ELEMENTS[dtype]), ("BITS", bits), ("TILE", tile))
    return Program("trellis_dequantize.cu", "trellis_dequantize", defines)


def programs() -> dict[Program, Budget]:
    """Return the variants to prove: every one for few tokens, and all heights of tiles as float16."""
    budgets: dict[Program, Budget] = {}
    for (dtype, oldest), bits in product(OLDEST.items(), WIDTHS):
        everyday = dtype == torch.float16 and bits == 3
        for tokens in DECODE_TOKENS:
            budgets[decode_program(bits, dtype, tokens)] = Budget(128, 16, oldest, everyday)
        for tile in TILES if dtype == torch.float16 else (DECODE_TILE,):
            budgets[dequantize_program(bits, tile, dtype)] = Budget(64, 0, oldest, everyday and tile == DECODE_TILE)
    return budgets
