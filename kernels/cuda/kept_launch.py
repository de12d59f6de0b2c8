"""Launches for weights with dropped groups: which program, for how many tokens, and how steps are divided."""

from __future__ import annotations

from math import ceil

import torch

from .kept_layout import OCTET, KeptVariant, KeptWeight, most_groups
from .packed import BLOCKS_PER_MULTIPROCESSOR, ELEMENTS, Device, Product, Workspace, rotation_arguments
from .program import Budget, Launch, Program

WARPS = 8
TOKENS = (1, 8)
ELEMENT_BYTES = 2


def decode_launch(product: Product[KeptWeight], device: Device, workspace: Workspace) -> Launch:
    """Return the launch that computes y for at most tokens_at_once tokens."""
    m, weight = product.x.shape[0], product.weight
    tokens = next(count for count in TOKENS if m <= count)
    steps, octets = weight.owners.numel(), weight.rows.shape[0]
    workers = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR * WARPS
    room = workspace.partial.numel() // (OCTET * tokens) - octets  # a piece for each octet and each worker
    share = ceil(steps / max(1, min(workers, room)))
    program = decode_program(weight.variant, product.x.dtype, tokens, product.unrotated)
    shared = rows_bytes(m, weight.width) + (weight.shape[1] * 4 if product.unrotated else 0)
    grid = (ceil(ceil(steps / share) / WARPS), 1, 1)
    (n, k), rank = weight.shape, 0 if product.low_rank_t is None else product.low_rank_t.shape[1]
    order = weight.hadamard if product.unrotated else 0
    arguments = (
        *(weight.codes, weight.groups, weight.zeros, weight.owners, weight.starts, weight.rows),
        *(product.x, product.y, product.bias, weight.low_rank_b, product.low_rank_t),
        *(workspace.partial, workspace.counters, m, n, k, rank, weight.width, steps, share),
        *rotation_arguments(order, k, product.x.device),
    )
    return Launch(program, grid, (32 * WARPS, 1, 1), shared, arguments)


def dequantize_launch(weight: KeptWeight, out: torch.Tensor) -> Launch:
    """Return the launch that writes kept groups, as out's dtype, into out (N, K); it leaves the others as they are."""
    n, k = weight.shape
    steps = weight.owners.numel()
    tensors = (weight.codes, weight.groups, weight.zeros, weight.owners, weight.rows, out)
    program = dequantize_program(weight.variant, out.dtype)
    return Launch(program, (ceil(steps / WARPS), 1, 1), (32 * WARPS, 1, 1), 0, (*tensors, n, k, steps))


def rows_bytes(m: int, width: int) -> int:
    """Return the shared memory for m rows of x: one, or an even number of them."""
    return (m + m % 2 if m > 1 else 1) * width * ELEMENT_BYTES


def tokens_at_once(width: int, shared_limit: int) -> int:
    """Return how many tokens a launch is for: their rows in two blocks' shared memory, an even number; or one row."""
    fit = shared_limit // BLOCKS_PER_MULTIPROCESSOR // (width * ELEMENT_BYTES)
    return max(1, min(TOKENS[-1], fit - fit % 2))


def longest_row(variant: KeptVariant, shared_limit: int) -> int:
    """Return how many inputs a weight can have, by shared memory (with a group more) and by the numbers of columns."""
    group = variant.group
    return min(most_groups(variant.bits), shared_limit // (group * ELEMENT_BYTES) - 1) * group


def decode_program(variant: KeptVariant, dtype: torch.dtype, tokens: int, rotated: bool = False) -> Program:
    """Return kept_decode.cu for up to `tokens` tokens, one of TOKENS; rotated: with the rotation of x, for one."""
    return _program("kept_decode", variant, dtype, TOKENS=tokens, ROTATED=int(rotated))


def dequantize_program(variant: KeptVariant, dtype: torch.dtype) -> Program:
    """Return kept_dequantize.cu."""
    return _program("kept_dequantize", variant, dtype)


def _program(name: str, variant: KeptVariant, dtype: torch.dtype, **more: int) -> Program:
    shape = {"BITS": variant.bits, "GROUP": variant.group, "WARPS": WARPS, **more}
    return Program(f"{name}.cu", name, (("ELEMENT", ELEMENTS[dtype]), *shape.items()))


def programs() -> dict[Program, Budget]:
    """Return the variants to prove: every width in groups of 16, and the other groups for two widths."""
    variants = [KeptVariant(bits, 16) for bits in (2, 3, 4, 5, 6, 8)]
    variants += [KeptVariant(bits, group) for bits in (4, 5) for group in (8, 32)]
    budgets: dict[Program, Budget] = {}
    for variant in variants:
        for dtype in ELEMENTS:
            everyday = dtype == torch.float16 and variant == KeptVariant(4, 16)
            oldest = 75 if dtype == torch.float16 else 80
            for tokens, rotated in ((TOKENS[0], False), (TOKENS[0], True), (TOKENS[1], False)):
                budget = Budget(128, 0, oldest, everyday and not rotated)
                budgets[decode_program(variant, dtype, tokens, rotated)] = budget
            budgets[dequantize_program(variant, dtype)] = Budget(128, 0, oldest, everyday)
    return budgets
