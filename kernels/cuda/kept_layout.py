"""A weight with dropped groups in the order that the CUDA kernels read: `include/kept.cuh` says how, this writes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch.nn import functional as F

from ...formats import Parts
from ...formats.group_sparse import kept_groups
from ...numerics.packing import unpack_bits
from ...spec import QuantSpec
from ..checks import expect_tensors
from .layout import PAIRS, contiguous, low_rank_shapes, pairs_as_words

OCTET = 8  # rows side by side
STEP = 128  # inputs of a row in a step
ZERO_BITS = 4  # before a column's 12, for codes of up to ZERO_BITS bits
STEPS_AT_ONCE = 1 << 12  # codes are arranged for 4 million inputs at a time: they take 12 bytes each meanwhile


@dataclass(frozen=True)
class KeptVariant:
    """What a kernel is compiled for besides the element type."""

    bits: int
    group: int


@dataclass(frozen=True)
class KeptWeight:
    """A prepared weight (N, K) of which some groups are dropped.

    With S steps and O octets: codes int32 (S, bits / v, 32, v); groups int32 (S, 8, h, w); zeros uint8 like groups,
    None for up to 4 bits; owners int32 (S,); starts int32 (O + 1,); rows int32 (O, 8); as in include/kept.cuh.
    low_rank_a, low_rank_b: float16 (R, K) and (N, R), or None. hadamard: order of the input's rotation, 0 for none.
    """

    variant: KeptVariant
    shape: tuple[int, int]
    codes: torch.Tensor
    groups: torch.Tensor
    zeros: torch.Tensor | None
    owners: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    low_rank_a: torch.Tensor | None
    low_rank_b: torch.Tensor | None
    hadamard: int

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __post_init__(self) -> None:
        """Raise ValueError for tensors that are not as above: a kernel computes from the sizes where it reads."""
        steps, octets = len(self.owners), ceil(self.shape[0] / OCTET)
        halves = 2 if self.variant.group == OCTET else 1
        in_step, vector = STEP // self.variant.group, vector_of(self.variant.bits)
        groups = (steps, OCTET, halves, in_step // halves)
        expect_tensors(
            {
                "codes": ((steps, self.variant.bits // vector, 32, vector), torch.int32),
                "groups": (groups, torch.int32),
                "zeros": (groups, torch.uint8),
                "owners": ((steps,), torch.int32),
                "starts": ((octets + 1,), torch.int32),
                "rows": ((octets, OCTET), torch.int32),
                **low_rank_shapes(self.low_rank_a, *self.shape),
            },
            vars(self),
        )

    @property
    def width(self) -> int:
        """The width of a row of x, see row_width."""
        return row_width(self.shape[1], self.variant.group)


@dataclass(frozen=True)
class _Order:
    """places int64 (C,): where groups go among those of all steps, empty ones too; the others are KeptWeight's."""

    places: torch.Tensor
    owners: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor


def row_width(k: int, group: int) -> int:
    """Return the inputs of a row of x as kernels read it: K in whole groups, and a group of zeros for empty places."""
    return (ceil(k / group) + 1) * group


def most_groups(bits: int) -> int:
    """Return how many groups a row can have: columns are numbered, and one more number is for empty groups."""
    return (1 << (16 - ZERO_BITS if bits <= ZERO_BITS else 15)) - 1


def prepare(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> KeptWeight:
    """Rearrange the parts of the group-sparse format, on the device that they are on.

    spec: of a code width in layout.CODE_BITS and with at most most_groups groups in a row. Raises CheckpointError where
    the parts mark more or fewer groups than the spec keeps.
    """
    kept, group = kept_groups(parts, spec, shape), spec.group_size
    order = _order(kept, STEP // group)
    steps = order.owners.numel()
    codes = unpack_bits(parts["qweight"], spec.bits, spec.group_length(shape))
    zeros = unpack_bits(parts["zeros"], spec.bits, spec.kept_groups(shape)) if "zeros" in parts else None
    words, apart = _group_words(parts["scales"], zeros, kept, spec)
    return KeptWeight(
        variant=KeptVariant(spec.bits, group),
        shape=shape,
        codes=_arrange(_placed(F.pad(codes, (0, group - codes.shape[-1])), order, steps, group), spec.bits),
        groups=_by_lanes(
            _placed(words, order, steps, group, int(_word(*torch.tensor([0, kept.shape[1], 0]), spec.bits)))
        ),
        zeros=None if apart is None else _by_lanes(_placed(apart, order, steps, group)),
        owners=order.owners,
        starts=order.starts,
        rows=order.rows,
        low_rank_a=contiguous(parts.get("low_rank_a")),
        low_rank_b=contiguous(parts.get("low_rank_b")),
        hadamard=spec.hadamard,
    )


def _order(kept: torch.Tensor, in_step: int) -> _Order:
    """Return the order of the groups kept (N, G), with in_step groups of a row in a step."""
    n, device = kept.shape[0], kept.device
    counts = kept.sum(1)
    by_count = counts.argsort(descending=True, stable=True)
    rows = F.pad(by_count, (0, -n % OCTET), value=n).view(-1, OCTET)
    lengths = (counts[by_count[::OCTET]].add(in_step - 1) // in_step).clamp(min=1)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    octets = torch.arange(len(lengths), device=device)
    owners = torch.repeat_interleave(2 * octets, lengths)
    owners[starts[1:] - 1] += 1
    place = torch.empty_like(by_count)  # of a row among all in order
    place[by_count] = torch.arange(n, device=device)
    row, _ = kept.nonzero(as_tuple=True)
    number = (kept.cumsum(1) - 1)[kept]  # of a group among its row's
    step = starts[place[row] // OCTET] + number // in_step
    places = (step * OCTET + place[row] % OCTET) * in_step + number % in_step
    return _Order(places, owners.int(), starts.int(), rows.int())


def _placed(values: torch.Tensor, order: _Order, steps: int, group: int, empty: int = 0) -> torch.Tensor:
    """Return values (C, ...) of groups as (steps, 8, groups of a step, ...); `empty` where there is no group."""
    in_step = STEP // group
    room = values.new_full((steps * OCTET * in_step, *values.shape[1:]), empty)
    room[order.places] = values
    return room.view(steps, OCTET, in_step, *values.shape[1:])


def _group_words(
    scales: torch.Tensor, zeros: torch.Tensor | None, kept: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return int32 (C,) of scale, column and zero points up to 4 bits; wider zero points are a uint8 (C,)."""
    _, column = kept.nonzero(as_tuple=True)
    zeros = torch.full_like(column, spec.mid) if zeros is None else zeros.long()
    words = _word(scales.contiguous().view(torch.int16).long() & 0xFFFF, column, zeros, spec.bits)
    return words, None if spec.bits <= ZERO_BITS else zeros.to(torch.uint8)


def _word(scale: torch.Tensor, column: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int32 from int64: bits of a float16 scale, column, and zero point where there is room for it."""
    word = scale | (column << ZERO_BITS | zero if bits <= ZERO_BITS else column) << 16
    return torch.where(word < 1 << 31, word, word - (1 << 32)).int()


def vector_of(bits: int) -> int:
    """Return how many words of codes a lane reads at once."""
    return 4 if bits % 4 == 0 else 2 if bits % 2 == 0 else 1


def _by_lanes(values: torch.Tensor) -> torch.Tensor:
    """Return (steps, 8, groups of a step) as (steps, 8, h, w): groups of 8 alternate between halves of a slot."""
    halves = 2 if values.shape[-1] == STEP // 8 else 1
    return values.unflatten(-1, (-1, halves)).transpose(-1, -2).contiguous()


def _arrange(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes uint8 (steps, 8, groups, group) as int32 (steps, bits / v, 32, v)."""
    return torch.cat([_words(part, bits, vector_of(bits)) for part in codes.split(STEPS_AT_ONCE)])


def _words(codes: torch.Tensor, bits: int, vector: int) -> torch.Tensor:
    step, row, slot, c, pair, which = range(6)
    split = codes.reshape(-1, OCTET, PAIRS // 2, 4, 2, 2).int()
    pairs = split.permute(step, slot, pair, row, c, which).reshape(-1, PAIRS, 32, 2)
    words = torch.cat(pairs_as_words(pairs, bits), dim=-2)
    return words.unflatten(1, (-1, vector)).transpose(-1, -2).contiguous()
