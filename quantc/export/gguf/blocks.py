"""GGUF's block types: the bytes of a row, from the integers and super scales that rounding chose, and back.

Layouts and arithmetic are those of ggml-common.h and ggml-quants.c in llama.cpp. Every type is one entry of `TYPES`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...errors import UsageError
from ...spec.grids.values import IQ4
from .pieces import Bits, Numbers, Piece, SixBits, Stored

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of FP4


@dataclass
class Blocks:
    """Rows W (..., N, K) as numbers, B = K / size blocks in each row, S sub-blocks in each block.

    codes: uint8 (..., N, K), the place of each weight among the type's levels.
    scales: float16 (..., N, B), of either sign; of MXFP4 uint8, the exponent e of a scale 2^(e - 127).
    minima: float16 (..., N, B), or None where the type has none.
    sub_scales: (..., N, B * S), uint8, or int8 where the type has signed ones; None where it has none.
    sub_minima: uint8 (..., N, B * S), or None.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None
    sub_scales: torch.Tensor | None = None
    sub_minima: torch.Tensor | None = None


@dataclass(frozen=True)
class BlockType:
    """How blocks of `size` weights are stored.

    number: the type's in GGUF. levels: the value of each code. pieces: the block's bytes in their order. subs: S, the
    sub-blocks of a block, 0 for none. sub_offset: added to signed sub-scales before they are stored. sub_bits: bits of
    a sub-scale or sub-minimum. minima: whether blocks have them.

    A weight is d * level, plus m where blocks have minima; with sub-blocks (d * s) * level, minus m * t where s and t
    are the sub-block's scale and minimum.
    """

    name: str
    number: int
    size: int
    levels: tuple[int, ...]
    pieces: tuple[Piece, ...]
    minima: bool = False
    subs: int = 0
    sub_bits: int = 0
    sub_offset: int = 0

    @property
    def piece_bytes(self) -> list[int]:
        """Bytes of each piece of a block."""
        scale = 1 if self.levels == E2M1 else 2
        counts = {"codes": self.size, "subs": self.subs * (1 + self.minima), "scale": scale, "minimum": 2}
        return [piece.size(counts) for piece in self.pieces]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(self.piece_bytes)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, all that is stored counted."""
        return 8 * self.block_bytes / self.size

    def row_bytes(self, k: int) -> int:
        """Return the bytes of a row of k weights; raises UsageError where blocks do not divide it."""
        if k % self.size:
            raise UsageError(
                f"rows of {k} weights are no whole number of {self.name}'s blocks of {self.size}; choose a type of "
                "smaller blocks, or keep the weight in floats."
            )
        return k // self.size * self.block_bytes

    def pack(self, blocks: Blocks) -> torch.Tensor:
        """Return uint8 (..., N, row_bytes(K)); raises UsageError where K is no multiple of the block size."""
        self.row_bytes(blocks.codes.shape[-1])
        numbers = {"codes": blocks.codes.unflatten(-1, (-1, self.size)), "scale": _as_bytes(blocks.scales)}
        if blocks.minima is not None:
            numbers["minimum"] = _as_bytes(blocks.minima)
        if blocks.sub_scales is not None:
            numbers["subs"] = self._join_subs(blocks.sub_scales, blocks.sub_minima)
        return torch.cat([piece.pack(numbers) for piece in self.pieces], -1).flatten(-2)

    def unpack(self, rows: torch.Tensor) -> Blocks:
        """Return what `pack` packed into rows, uint8 (..., N, bytes)."""
        numbers: Numbers = {}
        parts = rows.unflatten(-1, (-1, self.block_bytes)).split(self.piece_bytes, -1)
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.unpack(part, numbers)
        blocks = Blocks(numbers["codes"].flatten(-2), _from_bytes(numbers["scale"]))
        if self.minima:
            blocks.minima = _from_bytes(numbers["minimum"])
        if self.subs:
            blocks.sub_scales, blocks.sub_minima = self._part_subs(numbers["subs"])
        return blocks

    def _join_subs(self, scales: torch.Tensor, minima: torch.Tensor | None) -> torch.Tensor:
        """Return sub-scales as they are stored, then sub-minima, uint8 (..., N, B, S or 2 S)."""
        if self.sub_offset:
            scales = (scales.int() + self.sub_offset).to(torch.uint8)
        parts = [scales] if minima is None else [scales, minima]
        return torch.cat([part.unflatten(-1, (-1, self.subs)) for part in parts], -1)

    def _part_subs(self, subs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        scales, minima = subs[..., : self.subs].flatten(-2), subs[..., self.subs :].flatten(-2)
        if self.sub_offset:
            scales = (scales.int() - self.sub_offset).to(torch.int8)
        return scales, minima if self.minima else None

    def values(self, blocks: Blocks) -> torch.Tensor:
        """Return W, float32 (..., N, K), by the operations of llama.cpp's own decoder in their order."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=blocks.codes.device)
        weights = levels[blocks.codes.int()].unflatten(-1, (-1, self.size // max(1, self.subs)))
        scales, minima = self._spread(blocks.scales, blocks.sub_scales), None
        if blocks.minima is not None:
            minima = self._spread(blocks.minima, blocks.sub_minima)
        weights *= scales[..., None]
        if minima is not None:
            weights += -minima[..., None] if self.subs else minima[..., None]
        return weights.flatten(-2)

    def _spread(self, scales: torch.Tensor, subs: torch.Tensor | None) -> torch.Tensor:
        """Return float32 scales of sub-blocks, or of blocks where there are no sub-blocks."""
        spread = _power_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
        return spread if subs is None else spread.repeat_interleave(self.subs, -1) * subs


def _as_bytes(scales: torch.Tensor) -> torch.Tensor:
    return scales.contiguous()[..., None].view(torch.uint8)


def _from_bytes(stored: torch.Tensor) -> torch.Tensor:
    if stored.shape[-1] == 1:
        return stored[..., 0]
    return stored.contiguous().view(torch.float16)[..., 0]


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^(e - 128), half the scale, as the levels are doubled; e = 0 is a subnormal number."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents.int() - 128)


def _middle(bits: int) -> tuple[int, ...]:
    return tuple(range(-(1 << (bits - 1)), 1 << (bits - 1)))


SCALE, MINIMUM = Stored("scale"), Stored("minimum")
NIBBLES = Bits("codes", 0, 4, 16)
FIFTH = Bits("codes", 4, 1, 1)
LARGE_NIBBLES = Bits("codes", 0, 4, 32)

TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 2, 32, _middle(4), (SCALE, NIBBLES)),
        BlockType("Q4_1", 3, 32, tuple(range(16)), (SCALE, MINIMUM, NIBBLES), minima=True),
        BlockType("Q5_0", 6, 32, _middle(5), (SCALE, FIFTH, NIBBLES)),
        BlockType("Q5_1", 7, 32, tuple(range(32)), (SCALE, MINIMUM, FIFTH, NIBBLES), minima=True),
        BlockType("Q8_0", 8, 32, _middle(8), (SCALE, Bits("codes", 0, 8, 32, flip=128))),
        BlockType(
            "Q2_K", 10, 256, tuple(range(4)),
            (Bits("subs", 0, 4, 16), Bits("codes", 0, 2, 32), SCALE, MINIMUM),
            minima=True, subs=16, sub_bits=4,
        ),
        BlockType(
            "Q3_K", 11, 256, _middle(3),
            (Bits("codes", 2, 1, 32), Bits("codes", 0, 2, 32), Bits("subs", 0, 4, 8), Bits("subs", 4, 2, 4), SCALE),
            subs=16, sub_bits=6, sub_offset=32,
        ),
        BlockType(
            "Q4_K", 12, 256, tuple(range(16)), (SCALE, MINIMUM, SixBits(), LARGE_NIBBLES),
            minima=True, subs=8, sub_bits=6,
        ),
        BlockType(
            "Q5_K", 13, 256, tuple(range(32)),
            (SCALE, MINIMUM, SixBits(), Bits("codes", 4, 1, 32), LARGE_NIBBLES),
            minima=True, subs=8, sub_bits=6,
        ),
        BlockType(
            "Q6_K", 14, 256, _middle(6),
            (Bits("codes", 0, 4, 64), Bits("codes", 4, 2, 32), Bits("subs", 0, 8, 16, flip=128), SCALE),
            subs=16, sub_bits=8, sub_offset=128,
        ),
        BlockType("IQ4_NL", 20, 32, IQ4, (SCALE, NIBBLES)),
        BlockType(
            "IQ4_XS", 23, 256, IQ4,
            (SCALE, Bits("subs", 4, 2, 1), Bits("subs", 0, 4, 1), NIBBLES),
            subs=8, sub_bits=6, sub_offset=32,
        ),
        BlockType("MXFP4", 39, 32, E2M1, (SCALE, NIBBLES)),
    )
}  # fmt: skip
FLOAT_NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
FLOAT_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def stored_bytes(kind: BlockType | torch.dtype, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of this shape, its last dimension that of inputs."""
    *rows, k = shape
    return math.prod(rows) * (k * kind.itemsize if isinstance(kind, torch.dtype) else kind.row_bytes(k))
