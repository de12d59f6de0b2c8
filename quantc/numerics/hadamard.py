"""Hadamard matrices and the fast, randomly signed Hadamard rotation of the last axis.

A Hadamard matrix H of order n has entries +-1 and H H^T = n I. Constructions used: doubling (Sylvester 1867,
"Thoughts on inverse orthogonal matrices"), the two of Paley 1933 (paley.py), and Kronecker products of these. All of it
is exact and deterministic: rotated checkpoints depend on every sign here, so a change of any matrix or sign vector is a
change of format.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math

import torch

from .paley import CPU, paley_matrix, paley_orders

LARGEST_FACTOR_BITS = 4  # Sylvester factors reach order 2^4: three matmuls cover 4096, none costs over 16 per value
SIGNS_PER_DIGEST = 256
BAND = 1024  # rows of a matrix rotated at once in float64
LARGEST_BASE = 1024  # of a whole block: past it the dense base matrix costs more than it mixes


def hadamard_matrix(order: int) -> torch.Tensor:
    """Return float64 (order, order) of +-1: H_m (x) S_{2^k} with m = base_order(order), base first.

    Raises ValueError for an order that the constructions do not reach.
    """
    base = _base_of(order)
    return torch.kron(_base_matrix(base, torch.float64, CPU), _sylvester(order // base, torch.float64, CPU))


@functools.cache
def base_order(order: int) -> int | None:
    """Return the smallest m = 1, Paley order or product of two of those with order = m * 2^k; None without one."""
    if order < 1:
        return None
    odd = order // (order & -order)
    if odd == 1:
        return 1
    base = 4 * odd
    while order % base == 0:
        if paley_orders(base) is not None:
            return base
        base *= 2
    return None


@functools.cache
def block_order(width: int, most: int | None = None) -> int:
    """Return the block order for a width: its largest divisor, up to `most`, with base_order up to LARGEST_BASE.

    It is 1 where only 1 is left, as for odd widths.
    """
    if width < 1:
        raise ValueError(f"a width is at least 1, not {width}")
    counts = (count for count in range(1, width + 1) if width % count == 0 and (not most or width // count <= most))
    return next(width // count for count in counts if (base_order(width // count) or math.inf) <= LARGEST_BASE)


def fits(width: int, block: int) -> bool:
    """Return whether a width can be rotated in blocks of this order; 0 means no rotation."""
    return block == 0 or (block > 0 and width % block == 0 and base_order(block) is not None)


def signs(width: int) -> torch.Tensor:
    """Return float64 (width,) of +-1, the same on every machine and whatever the state of torch's generators.

    The stream is SHA-256(text 0) || SHA-256(text 1) || ..., 32 bytes each, where text c is the ASCII text
    "quantc hadamard {width} {c}" with both numbers in decimal. Bit i of the stream is bit i % 8 of byte i // 8,
    bit 0 the least significant one; sign i is -1 where bit i is 1, else +1.
    """
    digests = range(-(-width // SIGNS_PER_DIGEST))
    stream = b"".join(hashlib.sha256(f"quantc hadamard {width} {c}".encode("ascii")).digest() for c in digests)
    bits = [stream[i // 8] >> (i % 8) & 1 for i in range(width)]
    return 1 - 2 * torch.tensor(bits, dtype=torch.float64, device=CPU)


def is_small(width: int, block: int) -> bool:
    """Return whether rows are rotated in blocks smaller than the largest, which share their signs."""
    return block not in (0, width, block_order(width))


def rotation_signs(width: int, block: int) -> torch.Tensor:
    """Return float64 (width,) of +-1, the signs of rows that are rotated in blocks of an order.

    Blocks of the largest order that the width has get signs of their own. Smaller ones are for runtimes that keep one
    matrix for all blocks of a row: there every block has the signs of a row of its width.
    """
    return signs(block).repeat(width // block) if is_small(width, block) else signs(width)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return floating x (..., K) times orthogonal R = diag(s) blockdiag(H_block, ...) / sqrt(block), dtype kept.

    s is rotation_signs(K, block). K is a multiple of block. Half types are computed in float32. Rotating the rows of
    activations and of a weight (N, K) alike leaves x W^T as it is.
    """
    work = _checked(x, block)
    scaled = work * _scaled_signs(x.shape[-1], block, work.dtype, work.device)
    return _times_blocks(scaled, block, transposed=False).to(x.dtype)


def rotate_back(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return floating x (..., K) times R^T, the inverse of rotate: H_m of Paley need not be symmetric."""
    work = _checked(x, block)
    turned = _times_blocks(work, block, transposed=True)
    return (turned * _scaled_signs(x.shape[-1], block, work.dtype, work.device)).to(x.dtype)


def rotation(width: int, block: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return R itself, (width, width)."""
    return rotate(torch.eye(width, dtype=dtype, device=CPU), block)


def rotate_gram(gram: torch.Tensor, block: int) -> torch.Tensor:
    """Return float32 R^T G R for a symmetric gram (K, K), the Gram matrix of rotated rows; in float64, by bands."""
    once = torch.cat([rotate(band.double(), block).float() for band in gram.split(BAND)])
    return torch.cat([rotate(band.double(), block).float() for band in once.T.contiguous().split(BAND)])


def _checked(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return x in the dtype to compute in; raises for a block that does not fit."""
    if not x.is_floating_point():
        raise ValueError(f"only floating values rotate, not {x.dtype}")
    _base_of(block)
    if x.shape[-1] % block:
        raise ValueError(f"width {x.shape[-1]} is not a multiple of block {block}")
    return x if x.dtype in (torch.float64, torch.float32) else x.float()


def _times_blocks(x: torch.Tensor, block: int, transposed: bool) -> torch.Tensor:
    """Return x (..., K) times blockdiag(H_block, ...), or its transpose: one matmul for each Kronecker factor."""
    base = _base_of(block)
    turned = x
    rest = block
    with _own_precision(x.device):
        if base > 1:
            rest //= base
            matrix = _base_matrix(base, x.dtype, x.device)
            turned = _times_factor(turned, matrix.T if transposed else matrix, rest)
        for order in _sylvester_factors(rest):
            rest //= order
            turned = _times_factor(turned, _sylvester(order, x.dtype, x.device), rest)
    return turned.reshape(x.shape)


def _own_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Keep matmuls in their operands' dtype: calibration runs others in bfloat16. Meta tensors have no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _times_factor(x: torch.Tensor, factor: torch.Tensor, rest: int) -> torch.Tensor:
    """Return x, read as (count, f, rest), times factor (f, f) along the middle axis."""
    order = factor.shape[0]
    count = x.numel() // (order * rest)
    if rest == 1:
        return x.reshape(count, order) @ factor
    return torch.bmm(factor.T.expand(count, order, order), x.reshape(count, order, rest))


def _sylvester_factors(order: int) -> list[int]:
    """Return powers of two near each other whose product is order (a factor of 2 costs a pass like one of 16)."""
    bits = order.bit_length() - 1
    count = -(-bits // LARGEST_FACTOR_BITS)
    return [1 << (bits + index) // count for index in range(count)]


@functools.cache
def _scaled_signs(width: int, block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return rotation_signs(width, block) / sqrt(block), in dtype."""
    with torch.inference_mode(False):  # else a cached tensor could not serve autograd later
        return (rotation_signs(width, block) / math.sqrt(block)).to(device, dtype)


@functools.cache
def _sylvester(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return S of a power of two: (i, j) is -1 where i & j has an odd number of ones; symmetric."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while matrix.shape[0] < order:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


@functools.cache
def _base_matrix(base: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return H_m of a base_order m: a Paley matrix or the Kronecker product of two, the smaller first."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64, device=CPU)
        for order in paley_orders(base) or ():
            matrix = torch.kron(matrix, paley_matrix(order))
        return matrix.to(device, dtype)


def _base_of(order: int) -> int:
    base = base_order(order)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    return base
