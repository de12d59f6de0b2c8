"""The closed walk through a trellis that comes nearest to some numbers: a Viterbi search, in whole numbers.

This is the reference: kernels find the same states, bit for bit. It takes seconds for a thousand walks.

A step from state s with a new symbol of k bits leads to state (s << k | symbol) mod 2^12. Costs of paths are int16 in
units of 1 / 441, a squared difference each step: that loses 0.3 % against float32 at 4 bits, nothing below, and doubles
what a register holds. The two ends of a walk have to meet: a free run over the numbers around the seam says which L - k
bits they share, the head, and the walk then starts and ends with these. Against the best of all closed walks that loses
0.2 dB.
"""

from __future__ import annotations

from functools import cache

import torch

from ...spec import STATE_BITS
from .code import INTEGERS, RMS, STATES

AROUND = 32  # numbers on either side of the seam that the free run sees; 16 lose 2 % more
FARTHEST = 5.2  # of numbers, in units of their RMS: codes reach 3.42
VALUE_UNIT = 3800  # differences from codes are int16 up to 3803
LARGEST = 32767  # of int16


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
    return search.opened(low, search.back(last, choices)[1:]).to(torch.int16)


class _Search:
    """Steps of the search for walks (W,), each of which says for all its 2^(L - k) heads where paths come from."""

    def __init__(self, bits: int, numbers: torch.Tensor):
        self.bits, self.symbols, self.heads = bits, 1 << bits, STATES >> bits
        self.values = path_values(numbers.device)
        self.numbers = (numbers.clamp(-FARTHEST, FARTHEST) * VALUE_UNIT).round().int()

    def run(self, costs: torch.Tensor, places: range | list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the costs int32 (W, S) after steps at places of the walk, and the choices (W, 2^(L - k)) of each."""
        choices = []
        for place in places:
            costs, choice = self._step(costs, self.numbers[:, place])
            choices.append(choice)
        return costs, choices

    def _step(self, costs: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        least = costs[:, : self.heads].clone()
        choice = torch.zeros_like(least, dtype=torch.uint8)
        for symbol in range(1, self.symbols):  # of those that fall out; the first of equal ones stays
            other = costs[:, symbol * self.heads : (symbol + 1) * self.heads]
            less = other < least
            least = torch.where(less, other, least)
            choice.masked_fill_(less, symbol)
        least -= least.amin(1, keepdim=True)  # keeps the least cost near 0
        distance = (numbers[:, None] - self.values).square_().add_(1 << 14) >> 15
        return distance.add_(least.repeat_interleave(self.symbols, 1)).clamp_(max=LARGEST), choice

    def back(self, states: torch.Tensor, choices: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the states int64 (W,) before the first of these steps and after each; states: those after the last."""
        path = [states]
        for choice in reversed(choices):
            head = path[-1] >> self.bits
            path.append(head + self.heads * choice.gather(1, head[:, None])[:, 0].long())
        return path[::-1]

    def opened(self, heads: torch.Tensor, path: list[torch.Tensor]) -> torch.Tensor:
        """Return the states (W, T) of a path, the first of them made to come after heads (W,).

        They do already, unless a path out of another head looked as cheap: among numbers far from all codes many costs
        are LARGEST.
        """
        states = torch.stack(path, 1)
        length = _opening(self.bits)
        for step in range(length):
            own = self.bits * (step + 1)  # bits of the walk's own symbols in the state after this step
            symbols = (path[length - 1] & ((1 << self.bits * length) - 1)) >> (self.bits * length - own)
            states[:, step] = (heads << own | symbols) & (STATES - 1)
        return states


def _opening(bits: int) -> int:
    """Return the steps after which no state hands on a bit of the head."""
    return (STATE_BITS - 1) // bits


@cache
def path_values(device: torch.device) -> torch.Tensor:
    """Return int32 (STATES,): the values of states over their RMS, in units of 1 / VALUE_UNIT."""
    return (INTEGERS.to(device).double() / RMS * VALUE_UNIT).round().int()
