"""The values of codes that are not evenly spaced, by code."""

from __future__ import annotations

from math import nan

# Quantiles of a normal distribution between its extremes, 0 among them (Dettmers et al. 2023, arXiv:2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# The same idea in whole numbers, of llama.cpp.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def small_float(code: int, mantissa: int, bias: int) -> float:
    """Return the magnitude of a float without its sign: an exponent, then bits of the mantissa; subnormal at 0."""
    exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
    whole = fraction + (1 << mantissa if exponent else 0)
    return float(whole * 2.0 ** (max(exponent, 1) - bias - mantissa))


def _signed(magnitudes: list[float]) -> tuple[float, ...]:
    return (*magnitudes, *(-magnitude for magnitude in magnitudes))


E2M1 = _signed([small_float(code, 1, 1) for code in range(8)])  # OCP Microscaling Formats 1.0: 0, 0.5, ..., 4, 6
E4M3 = _signed([*(small_float(code, 3, 7) for code in range(127)), nan])  # OCP 8-bit Floating Point 1.0, to 448
