"""The pieces that a GGUF block is made of, one after the other in its bytes.

Each packs some numbers of a block into bytes, and adds them back to what was read. Numbers are kept by name: "codes"
uint8 (..., size); "subs" uint8 (..., sub-blocks), the sub-scales with their offset added, then the sub-minima; "scale"
and "minimum" uint8 (..., 2), the bytes of a float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .bits import pack_planes, unpack_planes

Numbers = dict[str, torch.Tensor]


class Piece(Protocol):
    """A run of bytes in a block."""

    def size(self, counts: dict[str, int]) -> int:
        """Return how many bytes the piece takes; counts: how many numbers of each name a block has."""

    def pack(self, numbers: Numbers) -> torch.Tensor:
        """Return the bytes, uint8 (..., size)."""

    def unpack(self, packed: torch.Tensor, numbers: Numbers) -> None:
        """Put the numbers of these bytes in, or add their bits to what is there."""


@dataclass(frozen=True)
class Bits:
    """Bits `low` to `low + count` of numbers, packed in planes of `length` bytes; `flip` is xored to them."""

    of: str
    low: int
    count: int
    length: int
    flip: int = 0

    def size(self, counts: dict[str, int]) -> int:
        return counts[self.of] * self.count // 8

    def pack(self, numbers: Numbers) -> torch.Tensor:
        mask = (1 << self.count) - 1
        return pack_planes(((numbers[self.of] >> self.low) & mask) ^ self.flip, self.count, self.length)

    def unpack(self, packed: torch.Tensor, numbers: Numbers) -> None:
        bits = (unpack_planes(packed, self.count, self.length) ^ self.flip) << self.low
        numbers[self.of] = numbers[self.of] | bits if self.of in numbers else bits


@dataclass(frozen=True)
class Stored:
    """Bytes that are stored as they are."""

    of: str

    def size(self, counts: dict[str, int]) -> int:
        return counts[self.of]

    def pack(self, numbers: Numbers) -> torch.Tensor:
        return numbers[self.of]

    def unpack(self, packed: torch.Tensor, numbers: Numbers) -> None:
        numbers[self.of] = packed


@dataclass(frozen=True)
class SixBits:
    """Sixteen 6-bit "subs", eight scales s and eight minima m, in twelve bytes.

    Bytes 0 to 3 are s0..s3 with the two high bits of s4..s7, bytes 4 to 7 the same of m, and bytes 8 to 11 the low four
    bits of s4..s7 with those of m4..m7 above them.
    """

    def size(self, counts: dict[str, int]) -> int:
        return counts["subs"] * 6 // 8

    def pack(self, numbers: Numbers) -> torch.Tensor:
        first, second = numbers["subs"].unflatten(-1, (2, 2, 4)).unbind(-2)
        low = first | ((second >> 4) << 6)
        high = (second[..., 0, :] & 15) | ((second[..., 1, :] & 15) << 4)
        return torch.cat([low.flatten(-2), high], -1)

    def unpack(self, packed: torch.Tensor, numbers: Numbers) -> None:
        low, high = packed[..., :8].unflatten(-1, (2, 4)), packed[..., 8:]
        nibbles = torch.stack([high & 15, high >> 4], -2)
        numbers["subs"] = torch.stack([low & 63, nibbles | ((low >> 6) << 4)], -2).flatten(-3)
