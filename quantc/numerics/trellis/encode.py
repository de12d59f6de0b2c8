"""The closed walk through a trellis that comes nearest to some numbers: a Viterbi search, in whole numbers.

This is the reference: kernels find the same states, bit for bit. It takes seconds for a thousand walks.

A step from state s with a new symbol of k bits leads to state (s << k | symbol) mod 2^12. Costs of paths are int16 in
units of 2^-10: that loses nothing against float32 at 12 bits and doubles what a register holds. The two ends of a walk
have to meet: a free run over the numbers around the seam says which L - k bits they share, and the walk then starts and
ends with these. Against the best of all closed walks that loses 0.2 dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...spec import STATE_BITS
from .code import INTEGERS, RMS, STATES

AROUND = 32  # numbers on either side of the seam that the free run sees; 16 lose 2 % more
FARTHEST = 3.99  # of numbers, in units of their RMS: codes reach 3.42
VALUE_UNIT, COST_UNIT = 1 << 13, 1 << 10
LARGEST, LEAST = 32767, -32768  # of int16


def encode(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int16 (W, T): the states of W closed walks near float32 numbers (W, T), whose RMS should be near 1.

    bits: of a symbol. States are in the order of the search: the symbol of each comes after those of the states before.
    """
    search = _Search(bits, numbers)
    walks, length = numbers.shape
    free = torch.zeros(walks, STATES, dtype=torch.int32, device=numbers.device)
    seam = [(step - AROUND) % length for step in range(2 * AROUND)]
    costs, choices = search.run(free, seam)
    low = search.back(costs.argmin(1), choices[AROUND:])[0] & (search.heads - 1)
    ends = low[:, None] + search.heads * torch.arange(search.symbols, device=numbers.device)
    costs, choices = search.run(torch.full_like(free, LARGEST).scatter_(1, ends, 0), range(length))
    last = ends.gather(1, costs.gather(1, ends).argmin(1, keepdim=True))[:, 0]
    return torch.stack(search.back(last, choices)[1:], 1).to(torch.int16)


class _Search:
    """Steps of the search for walks (W,), each of which says for all its 2^(L - k) heads where paths come from."""

    def __init__(self, bits: int, numbers: torch.Tensor):
        self.bits, self.symbols, self.heads = bits, 1 << bits, STATES >> bits
        self.tables = path_tables(numbers.device)
        numbers = numbers.clamp(-FARTHEST, FARTHEST)
        self.products = (numbers * -VALUE_UNIT).round().int()
        self.squares = (numbers * numbers * COST_UNIT).round().int()

    def run(self, costs: torch.Tensor, places: range | list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the costs int32 (W, S) after steps at places of the walk, and the choices (W, 2^(L - k)) of each."""
        choices = []
        for place in places:
            costs, choice = self._step(costs, self.products[:, place], self.squares[:, place])
            choices.append(choice)
        return costs, choices

    def _step(
        self, costs: torch.Tensor, products: torch.Tensor, squares: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        least = costs[:, : self.heads].clone()
        choice = torch.zeros_like(least, dtype=torch.uint8)
        for symbol in range(1, self.symbols):  # of those that fall out; the first of equal ones stays
            other = costs[:, symbol * self.heads : (symbol + 1) * self.heads]
            less = other < least
            least = torch.where(less, other, least)
            choice.masked_fill_(less, symbol)
        offset = (squares - least.amin(1)).clamp(LEAST, LARGEST)  # keeps the least cost near 0
        distance = (products[:, None] * self.tables.values + (1 << 14)) >> 15
        distance = (distance + self.tables.squares).clamp_(LEAST, LARGEST).add_(offset[:, None]).clamp_(LEAST, LARGEST)
        return distance.add_(least.repeat_interleave(self.symbols, 1)).clamp_(LEAST, LARGEST), choice

    def back(self, states: torch.Tensor, choices: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the states int64 (W,) before the first of these steps and after each; states: those after the last."""
        path = [states]
        for choice in reversed(choices):
            head = path[-1] >> self.bits
            path.append(head + self.heads * choice.gather(1, head[:, None])[:, 0].long())
        return path[::-1]


@dataclass(frozen=True)
class PathTables:
    """By state, int32: values of codes over their RMS in units of 2^-13, and their squares in units of 2^-10."""

    values: torch.Tensor
    squares: torch.Tensor


@cache
def path_tables(device: torch.device) -> PathTables:
    """Return what the search adds up, on a device."""
    values = INTEGERS.to(device).double() / RMS
    assert values.shape == (1 << STATE_BITS,)
    return PathTables((values * VALUE_UNIT).round().int(), (values.square() * COST_UNIT).round().int())
