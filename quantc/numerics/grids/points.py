"""The values of a grid's codes where they are not evenly spaced: the nearest of them, and which code it is."""

from __future__ import annotations

from functools import cache

import torch

# Floats that agree in sign, exponent and four bits of the mantissa make a bin. Between two of a table's values there is
# a bound, and no bin has two bounds: relative to their size, 4-bit tables have them farther apart, and FP8 at the
# edges of bins. Finding a bin and comparing with its bound takes 4 ns, a binary search 19 to 38.
BIN_BITS, BELOW = 13, 19


class Points:
    """values: float32 (codes,), by code; NaN where a code has none.

    rising: float32 (P,), the different values in their order, and codes: uint8 (P,), the first code of each: of 0 and
    -0 that is 0.
    """

    def __init__(self, values: tuple[float, ...], device: torch.device):
        first: dict[float, int] = {}
        for code, value in enumerate(values):
            if value == value:
                first.setdefault(value, code)
        self.values = torch.tensor(values, device=device)
        self.rising = torch.tensor(sorted(first), device=device, dtype=torch.float32)
        self.codes = torch.tensor([first[value] for value in sorted(first)], device=device, dtype=torch.uint8)
        bounds = (self.rising[1:] + self.rising[:-1]) / 2
        self._bounds = torch.cat([bounds, bounds.new_tensor([torch.inf])])  # after each value
        self._least = torch.bucketize(_least_of_bins(device), bounds, out_int32=True)

    @property
    def top(self) -> float:
        """The largest magnitude."""
        return float(self.rising.abs().max())

    def nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """Return int32, shaped as float32 wanted: the place of the nearest among `rising`, the lower of two."""
        flat = wanted.flatten()
        bins = flat.view(torch.int32).bitwise_right_shift(BELOW).bitwise_and_((1 << BIN_BITS) - 1)
        least = self._least.index_select(0, bins)
        return least.add_(flat > self._bounds.index_select(0, least)).view(wanted.shape)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Return float32 values at places among `rising`, shaped as these."""
        return self.rising.index_select(0, places.flatten()).view(places.shape)

    def of_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Return float32 values, shaped as codes."""
        return self.values.index_select(0, codes.flatten().int()).view(codes.shape)


def _least_of_bins(device: torch.device) -> torch.Tensor:
    """Return float32 (bins,), the least float of each bin; of negative ones that has the largest magnitude."""
    bins = torch.arange(1 << BIN_BITS, device=device)
    ends = (bins << BELOW) + torch.where(bins >= 1 << (BIN_BITS - 1), (1 << BELOW) - 1, 0)
    return torch.where(ends >= 1 << 31, ends - (1 << 32), ends).int().view(torch.float32).nan_to_num_(-torch.inf)


@cache
def points_of(values: tuple[float, ...], device: torch.device) -> Points:
    """Return the points of values by code, on a device."""
    return Points(tuple(map(float, values)), device)
