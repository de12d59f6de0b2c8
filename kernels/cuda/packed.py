"""Launches of the packed matmul: which program, how many blocks, and how K is split among them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Generic, TypeVar

import torch

from ...numerics.hadamard import base_order, fits
from . import hadamard
from .kept_layout import KeptWeight
from .layout import TILE, CudaWeight, Variant
from .program import Budget, Launch, Program
from .trellis_layout import TrellisWeight

Weight = TypeVar("Weight", CudaWeight, KeptWeight, TrellisWeight)
ELEMENTS = {torch.float16: "Half", torch.bfloat16: "Bfloat"}

X_STEP = 8  # inputs: a row of x is read 16 bytes at a time
DECODE_WARPS = 8
DECODE_TOKENS = (8, 16)
MATMUL_STRIPS, MATMUL_SLICES = 4, 1
MATMUL_TOKENS = (32, 64)
MATMUL_STAGES = (4, 3, 2)  # as many as shared memory holds
DEQUANTIZE_WARPS = 8
TOKEN_STRIDE = 68  # as in include/finish.cuh
BLOCKS_PER_MULTIPROCESSOR = 2  # that the registers of most variants allow
FUSED_TOKENS, FUSED_INPUTS = 1, 4096  # up to which every block rotates x again rather than one launch for all
SPLIT_COST = 0.02  # of the whole time, for each further split: the sums travel through memory


@dataclass(frozen=True)
class Device:
    """What the shape of a launch depends on; shared_limit: bytes of shared memory that a block can ask for."""

    multiprocessors: int
    shared_limit: int


@dataclass(frozen=True)
class Workspace:
    """Where blocks that share rows of y leave their sums: float32 and int32, the counters zero between launches."""

    partial: torch.Tensor
    counters: torch.Tensor


@dataclass(frozen=True)
class Product(Generic[Weight]):
    """y (M, N) = x (M, K) W^T + bias + low_rank_t low_rank_b^T; low_rank_t float32 (M, R), others of one dtype."""

    x: torch.Tensor
    y: torch.Tensor
    weight: Weight
    bias: torch.Tensor | None = None
    low_rank_t: torch.Tensor | None = None
    unrotated: bool = False  # x is still to be rotated as the weight says; the launches for one row can do that


def decode_launch(product: Product[CudaWeight], device: Device, workspace: Workspace) -> Launch:
    """Return the launch that computes y for at most 16 tokens."""
    m = product.x.shape[0]
    tokens = next(count for count in DECODE_TOKENS if m <= count)
    strips, tiles_k = product.weight.tiles.shape[:2]
    room = workspace.partial.numel() // (strips * tokens * TILE)
    splits = best_splits(strips, tiles_k, DECODE_WARPS, device.multiprocessors, room)
    program = decode_program(product.weight.variant, product.x.dtype, tokens, product.unrotated)
    shared = _rotation_bytes(product.weight, m, splits) if product.unrotated else 0
    order = product.weight.hadamard if product.unrotated else 0
    rotation = rotation_arguments(order, product.weight.shape[1], product.x.device)
    arguments = (*_arguments(product, workspace), *rotation)
    return Launch(program, (strips, splits, 1), (32 * DECODE_WARPS, 1, 1), shared, arguments)


def rotates(weight: CudaWeight | KeptWeight, m: int) -> bool:
    """Return whether decode_launch, here or in kept_launch.py, should rotate x (m, K) itself."""
    order, k = weight.hadamard, weight.shape[1]
    if order == 0 or order % X_STEP or not fits(k, order):
        return False  # what does not fit would lead the kernel out of its memory: `rotate` refuses it
    return m <= FUSED_TOKENS and k <= FUSED_INPUTS and weight.low_rank_a is None


def matmul_launch(product: Product[CudaWeight], device: Device, workspace: Workspace) -> Launch:
    """Return the launch that computes y for any number of tokens."""
    m, variant = product.x.shape[0], product.weight.variant
    tokens = next((count for count in MATMUL_TOKENS if m <= count), MATMUL_TOKENS[-1])
    strips, tiles_k = product.weight.tiles.shape[:2]
    across, along = ceil(strips / MATMUL_STRIPS), ceil(m / tokens)
    room = workspace.partial.numel() // (across * along * tokens * TILE * MATMUL_STRIPS)
    splits = best_splits(across * along, tiles_k, MATMUL_SLICES, device.multiprocessors, room)
    program, shared = matmul_program_for(variant, product.x.dtype, tokens, device.shared_limit)
    grid, block = (across, splits, along), (64 * MATMUL_STRIPS * MATMUL_SLICES, 1, 1)
    return Launch(program, grid, block, shared, _arguments(product, workspace))


def dequantize_launch(weight: CudaWeight, out: torch.Tensor) -> Launch:
    """Return the launch that writes the weight (N, K) itself, as out's dtype."""
    strips, tiles_k = weight.tiles.shape[:2]
    (n, k), group, groups = weight.shape, weight.group, weight.groups
    arguments = (weight.tiles, weight.scales, weight.zeros, out, n, k, tiles_k, group, groups)
    program = dequantize_program(weight.variant, out.dtype)
    grid = (ceil(tiles_k / DEQUANTIZE_WARPS), strips, 1)
    return Launch(program, grid, (32 * DEQUANTIZE_WARPS, 1, 1), 0, arguments)


@functools.cache
def best_splits(blocks: int, tiles_k: int, workers: int, multiprocessors: int, room: int) -> int:
    """Return how many parts to cut K into, so that most of the GPU works most of the time.

    blocks: without splitting. workers: warps of a block that share its tiles. room: splits the workspace has room for.
    """
    slots = multiprocessors * BLOCKS_PER_MULTIPROCESSOR

    def rounds(splits: int) -> float:
        waves = ceil(blocks * splits / slots)
        return waves * ceil(tiles_k / (splits * workers)) * (1 + SPLIT_COST * (splits - 1))

    return min(range(1, max(1, min(ceil(tiles_k / workers), room)) + 1), key=rounds)


def decode_program(variant: Variant, dtype: torch.dtype, tokens: int, rotated: bool = False) -> Program:
    """Return decode.cu for up to `tokens` tokens, one of DECODE_TOKENS; rotated: with the rotation of x."""
    return _program("decode", variant, dtype, TOKENS=tokens, WARPS=DECODE_WARPS, ROTATED=int(rotated))


def matmul_program(variant: Variant, dtype: torch.dtype, tokens: int, stages: int) -> Program:
    """Return matmul.cu in steps of `tokens` tokens, one of MATMUL_TOKENS."""
    shape = {"STRIPS": MATMUL_STRIPS, "SLICES": MATMUL_SLICES, "STAGES": stages}
    return _program("matmul", variant, dtype, TOKENS=tokens, **shape)


def matmul_program_for(variant: Variant, dtype: torch.dtype, tokens: int, shared_limit: int) -> tuple[Program, int]:
    """Return the program with as many stages as fit, and the bytes of dynamic shared memory it takes."""
    stages = next((s for s in MATMUL_STAGES if _matmul_shared(variant, tokens, s) <= shared_limit), MATMUL_STAGES[-1])
    return matmul_program(variant, dtype, tokens, stages), _matmul_shared(variant, tokens, stages)


def dequantize_program(variant: Variant, dtype: torch.dtype) -> Program:
    """Return dequantize.cu."""
    return _program("dequantize", variant, dtype, WARPS=DEQUANTIZE_WARPS)


def _program(name: str, variant: Variant, dtype: torch.dtype, **more: int) -> Program:
    defines: dict[str, int | str] = {
        "ELEMENT": ELEMENTS[dtype],
        "BITS": variant.bits,
        "PER_IC": int(variant.per_ic),
        "SYMMETRIC": int(variant.symmetric),
        "SETS": variant.sets,
        **more,
    }
    return Program(f"{name}.cu", name, tuple(defines.items()))


def _matmul_shared(variant: Variant, tokens: int, stages: int) -> int:
    """Return the bytes of the pipeline's stages, later overlaid by the sums of all rows."""
    tiles = MATMUL_STRIPS * MATMUL_SLICES * (variant.bits * 512 + variant.sets * TILE * 3)
    x = MATMUL_SLICES * tokens * TILE * 2
    return max(stages * (tiles + x), MATMUL_STRIPS * tokens * TOKEN_STRIDE * 4)


def _rotation_bytes(weight: CudaWeight, m: int, splits: int) -> int:
    """Return decode.cu's dynamic shared memory: a float32 row and m rows in 16 bits of the widest split's inputs."""
    k, order, tiles_k = weight.shape[1], weight.hadamard, weight.tiles.shape[1]
    edges = [tiles_k * split // splits * TILE for split in range(splits + 1)]
    widths = [min(k, -(-high // order) * order) - low // order * order for low, high in pairwise(edges)]
    return max(widths) * (4 + 2 * m)


def rotation_arguments(order: int, k: int, device: torch.device) -> tuple[Any, ...]:
    """Return the last arguments of programs that rotate rows of K inputs themselves; order 0: of those that do not."""
    if order == 0:
        return (None, None, 0, 0, 0.0)
    base = base_order(order) or 1
    return (*hadamard.tables(k, order, device), base, (order // base).bit_length() - 1, order**-0.5)


def _arguments(product: Product[CudaWeight], workspace: Workspace) -> tuple[Any, ...]:
    """Return the arguments of decode and matmul."""
    weight = product.weight
    (n, k), m, rank = weight.shape, product.x.shape[0], 0
    if product.low_rank_t is not None:
        rank = product.low_rank_t.shape[1]
    tensors = (weight.tiles, weight.scales, weight.zeros, product.x, product.y, product.bias)
    extras = (weight.low_rank_b, product.low_rank_t, workspace.partial, workspace.counters)
    return (*tensors, *extras, m, n, k, weight.tiles.shape[1], weight.group, weight.groups, rank)


def programs() -> dict[Program, Budget]:
    """Return the variants to prove: every width with both groupings, and all sets of scales for three widths."""
    variants = [Variant(bits, per_ic, False, 1) for bits in (2, 3, 4, 5, 6, 8) for per_ic in (False, True)]
    variants += [
        Variant(bits, per_ic, False, sets) for bits in (3, 4, 8) for per_ic, sets in ((False, 2), (True, 2), (True, 4))
    ]
    variants.append(Variant(4, False, True, 1))
    budgets: dict[Program, Budget] = {}
    for variant in variants:
        for dtype in ELEMENTS:
            everyday = dtype == torch.float16 and variant in (Variant(3, True, False, 4), Variant(4, False, False, 1))
            oldest = 75 if dtype == torch.float16 else 80
            for tokens in DECODE_TOKENS:
                shared = DECODE_WARPS * tokens * TOKEN_STRIDE * 4 + 16
                budgets[decode_program(variant, dtype, tokens)] = Budget(255, shared, oldest, everyday)
            if variant.sets == 1:
                shared = DECODE_WARPS * DECODE_TOKENS[0] * TOKEN_STRIDE * 4 + 16
                budgets[decode_program(variant, dtype, DECODE_TOKENS[0], True)] = Budget(255, shared, oldest, everyday)
            for tokens in MATMUL_TOKENS:
                budgets[matmul_program(variant, dtype, tokens, MATMUL_STAGES[0])] = Budget(200, 16, 80, everyday)
            budgets[dequantize_program(variant, dtype)] = Budget(128, 0, oldest, everyday)
    return budgets
