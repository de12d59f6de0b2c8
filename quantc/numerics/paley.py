"""The Hadamard matrices of Paley 1933 ("On orthogonal matrices"), over finite fields of prime-power order.

Exact and deterministic: rotated checkpoints depend on every sign.
"""

from __future__ import annotations

import functools
import math

import torch

CPU = torch.device("cpu")  # always named: a default device ("meta") at the first call must not enter a cache


@functools.cache
def paley_orders(order: int) -> tuple[int, ...] | None:
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


def paley_matrix(order: int) -> torch.Tensor:
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
