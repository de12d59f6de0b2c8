"""Hadamard matrices and the fast, randomly signed Hadamard rotation of the last axis.

A Hadamard matrix H of order n has entries +-1 and H H^T = n I. Constructions used: doubling (Sylvester 1867,
"Thoughts on inverse orthogonal matrices"), the two of Paley 1933 ("On orthogonal matrices") over finite fields of
prime-power order, and Kronecker products of these. All of it is exact and deterministic: rotated checkpoints
depend on every sign here, so a change of any matrix or sign vector is a change of format.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math

import torch

CPU = torch.device("cpu")  # always named: a default device ("meta") at the first call must not enter a cache
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
        if _paley_orders(base) is not None:
            return base
        base *= 2
    return None


@functools.cache
def block_order(width: int) -> int:
    """Return the block order for a width: its largest divisor with base_order up to LARGEST_BASE (1 if odd)."""
    if width < 1:
        raise ValueError(f"a width is at least 1, not {width}")
    counts = (count for count in range(1, width + 1) if width % count == 0)
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


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return floating x (..., K) times orthogonal R = diag(signs(K)) blockdiag(H_block, ...) / sqrt(block), dtype kept.

    K is a multiple of block. Half types are computed in float32. Rotating the rows of activations and of a weight
    (N, K) alike leaves x W^T as it is.
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
    """Return signs(width) / sqrt(block), in dtype."""
    with torch.inference_mode(False):  # else a cached tensor could not serve autograd later
        return (signs(width) / math.sqrt(block)).to(device, dtype)


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
        for order in _paley_orders(base) or ():
            matrix = torch.kron(matrix, _paley(order))
        return matrix.to(device, dtype)


def _base_of(order: int) -> int:
    base = base_order(order)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    return base


@functools.cache
def _paley_orders(order: int) -> tuple[int, ...] | None:
    """Return one Paley order, or two (smaller first, as unequal as can be), whose product is order."""
    if _paley_field(order) is not None:
        return (order,)
    for first in range(4, math.isqrt(order) + 1, 4):
        if order % first == 0 and _paley_field(first) and _paley_field(order // first):
            return (first, order // first)
    return None


@functools.cache
def _paley_field(order: int) -> tuple[int, int] | None:
    """Return (p, e) of the field GF(p^e) behind the Paley matrix of an order, construction I before II, or None."""
    if order % 4:
        return None
    first = _prime_power(order - 1)  # = 3 mod 4, for order = 0 mod 4
    if first is not None:
        return first
    q = order // 2 - 1
    return _prime_power(q) if q % 4 == 1 else None


def _paley(order: int) -> torch.Tensor:
    """Return float64 (order, order), with Q (a, b) = character of a - b and C = [[0, 1], [Q_0 1, Q]], Q_0 that of -1.

    q = 3 mod 4: Q and C are skew, H = I + C. q = 1 mod 4: both are symmetric, H = C (x) A + I (x) B.
    """
    field = _paley_field(order)
    if field is None:
        raise ValueError(f"{order} is not a Paley order")
    p, e = field
    q = p**e
    skew = q % 4 == 3
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64, device=CPU)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if skew else 1
    bordered[1:, 1:] = _quadratic_character(p, e)[_differences(p, e)]
    identity = torch.eye(q + 1, dtype=torch.float64, device=CPU)
    if skew:
        return identity + bordered
    of_sign = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64, device=CPU)
    of_diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64, device=CPU)
    return torch.kron(bordered, of_sign) + torch.kron(identity, of_diagonal)


def _quadratic_character(p: int, e: int) -> torch.Tensor:
    """Return float64 (p^e,): 0 of zero, 1 of a square of GF(p^e), else -1. Element i has the base-p digits of i."""
    modulus = _irreducible(p, e)
    character = [-1] * p**e
    for element in range(p**e):
        square = _remainder(_product(_digits(element, p, e), _digits(element, p, e)), modulus, p)
        character[sum(digit * p**place for place, digit in enumerate(square))] = 1
    character[0] = 0
    return torch.tensor(character, dtype=torch.float64, device=CPU)


def _differences(p: int, e: int) -> torch.Tensor:
    """Return int64 (q, q), the element a - b of GF(p^e), digit by digit."""
    elements = torch.arange(p**e, device=CPU)
    difference = torch.zeros(p**e, p**e, dtype=torch.int64, device=CPU)
    for place in range(e):
        digit = elements // p**place % p
        difference += (digit[:, None] - digit[None, :]) % p * p**place
    return difference


# Polynomials over GF(p): lists of coefficients, that of x^0 first.


def _irreducible(p: int, e: int) -> list[int]:
    """Return the first monic irreducible polynomial of degree e, in the order of its lower coefficients as a number."""
    divisors = [_monic(low, p, degree) for degree in range(1, e // 2 + 1) for low in range(p**degree)]
    candidates = (_monic(low, p, e) for low in range(p**e))
    return next(c for c in candidates if all(any(_remainder(c, divisor, p)) for divisor in divisors))


def _monic(low: int, p: int, degree: int) -> list[int]:
    return [*_digits(low, p, degree), 1]


def _digits(number: int, p: int, count: int) -> list[int]:
    return [number // p**place % p for place in range(count)]


def _product(left: list[int], right: list[int]) -> list[int]:
    """Return the product's coefficients, not yet reduced mod p."""
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return product


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """Return the remainder by a monic divisor of degree d >= 1: at most d coefficients in 0..p-1."""
    degree = len(divisor) - 1
    rest = list(dividend)
    for top in range(len(rest) - 1, degree - 1, -1):
        lead = rest[top]
        for place, coefficient in enumerate(divisor):
            rest[top - degree + place] -= lead * coefficient
    return [coefficient % p for coefficient in rest[:degree]]


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, e) with q = p^e, p prime, e >= 1; None for other q."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    e = 0
    while q % p == 0:
        q //= p
        e += 1
    return (p, e) if q == 1 else None
