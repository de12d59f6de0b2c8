"""Packed codes against the definition of the layout, bit by bit, in Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantc.numerics.packing import pack_bits, unpack_bits
from quantc.spec import MAX_BITS, MIN_BITS, packed_bytes

WIDTHS = range(MIN_BITS, MAX_BITS + 1)
LEADING = [(), (1,), (3,), (2, 3), (0,)]


def pack_slowly(codes: list[int], bits: int) -> list[int]:
    """Code k occupies bits [k*b, (k+1)*b) of the row, bit 0 = least significant bit of byte 0."""
    stream = sum(code << (index * bits) for index, code in enumerate(codes))
    return list(stream.to_bytes(-(-len(codes) * bits // 8), "little"))


def draw_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(MIN_BITS, MAX_BITS), data=st.data())
def test_layout_is_the_bit_stream_of_the_format_page(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=70))
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == pack_slowly(codes, bits)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(MIN_BITS, MAX_BITS),
    count=st.integers(1, 70),
    leading=st.sampled_from(LEADING),
    seed=st.integers(0, 99),
)
def test_roundtrip_is_exact(bits: int, count: int, leading: tuple[int, ...], seed: int) -> None:
    codes = draw_codes(bits, (*leading, count), seed)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*leading, packed_bytes(count, bits))
    assert packed.is_contiguous()
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_count_up_to_70_roundtrips_with_extreme_codes(bits: int) -> None:
    top = (1 << bits) - 1
    for count in range(1, 71):
        codes = torch.stack([torch.full((count,), top), torch.zeros(count), torch.arange(count) % 2 * top])
        codes = codes.to(torch.uint8)
        assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 3, 7, 13, 70])
def test_spare_bits_are_zero(bits: int, count: int) -> None:
    packed = pack_bits(torch.full((2, count), (1 << bits) - 1, dtype=torch.uint8), bits)
    used = count * bits - (packed.shape[1] - 1) * 8
    assert packed[:, -1].tolist() == [(1 << used) - 1] * 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_rows_are_packed_each_on_its_own(bits: int) -> None:
    codes = draw_codes(bits, (2, 3, 11))
    packed = pack_bits(codes, bits)
    for e in range(2):
        for n in range(3):
            assert packed[e, n].tolist() == pack_slowly(codes[e, n].tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_strided_codes_pack_like_contiguous_ones(bits: int) -> None:
    codes = draw_codes(bits, (13, 6)).T
    assert not codes.is_contiguous()
    assert torch.equal(pack_bits(codes, bits), pack_bits(codes.contiguous(), bits))
    packed = pack_bits(codes, bits)
    every_second = packed.repeat_interleave(2, dim=0)[::2]
    assert torch.equal(unpack_bits(every_second, bits, 13), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_leaves_the_codes_alone_and_shares_no_memory(bits: int) -> None:
    codes = draw_codes(bits, (4, 16))
    before = codes.clone()
    pack_bits(codes, bits).fill_(0xFF)
    assert torch.equal(codes, before)
