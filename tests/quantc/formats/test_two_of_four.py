"""Two of four: exact parts for any shape, and the product of the unpacked weight."""

from __future__ import annotations

import pytest
import torch

from quantc.errors import CheckpointError, UsageError
from quantc.formats import DENSE, FORMATS, TWO_OF_FOUR, format_of
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose
from quantc.numerics.groups import spread_groups
from quantc.numerics.qtensor import QTensor
from quantc.numerics.sparsity import by_magnitude
from quantc.spec import WHOLE_ROW, QuantSpec

SHAPES = [(1, 1), (7, 13), (16, 32), (9, 70), (5, 255)]
LEADING = [(), (3,), (2, 2)]
SPECS = [
    QuantSpec(bits, group, symmetric=symmetric, rank=rank, two_of_four=True)
    for bits, group, rank in ((2, 8, 0), (3, 5, 2), (4, 64, 0), (7, WHOLE_ROW, 1), (8, 16, 0))
    for symmetric in (False, True)
]


def random_qtensor(spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    n, k = shape
    groups = (*leading, *spec.scales_shape(shape))

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, spec.levels, size, dtype=torch.uint8, generator=generator)

    def halves(*size: int) -> torch.Tensor:
        return torch.randn(*leading, *size, generator=generator).half()

    kept = by_magnitude(torch.randn(torch.Size(leading).numel() * n, k, generator=generator), spec)
    kept = kept.reshape(*leading, n, k)
    zeros = None if spec.symmetric else codes(*groups)
    middle = torch.tensor(spec.mid, dtype=torch.uint8) if zeros is None else spread_groups(zeros, spec.groups, shape)
    return QTensor(
        spec,
        torch.where(kept, codes(*leading, n, k), middle),
        halves(*spec.scales_shape(shape)),
        zeros,
        halves(spec.rank, k) if spec.rank else None,
        halves(n, spec.rank) if spec.rank else None,
        kept=kept,
    )


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_pack_follows_the_layout_and_unpacks_exactly(spec: QuantSpec, leading: tuple[int, ...]) -> None:
    for shape in SHAPES:
        tensor = random_qtensor(spec, shape, leading)
        parts = TWO_OF_FOUR.pack(tensor)
        layout = TWO_OF_FOUR.layout(spec, shape, leading)
        assert {name: (part.dtype, part.shape) for name, part in parts.items()} == {
            name: (part.dtype, part.shape) for name, part in layout.items()
        }
        again = TWO_OF_FOUR.unpack(parts, spec, shape)
        for field in ("codes", "scales", "zeros", "low_rank_a", "low_rank_b", "kept"):
            before, after = getattr(tensor, field), getattr(again, field)
            assert (before is None and after is None) or torch.equal(before, after), (spec, shape, field)
        stored = sum(part.nbytes for part in parts.values()) // torch.Size(leading).numel()
        assert spec.stored_bits(shape) == 8 * stored


def test_the_bits_of_half_the_codes_and_their_places() -> None:
    assert QuantSpec(4, 64, two_of_four=True).bits_per_weight((512, 512)) == 2 + 1 + 20 / 64
    assert QuantSpec(4, 64, two_of_four=True).label() == "w4g64-2:4"
    assert format_of(QuantSpec(4, 64, two_of_four=True)) is TWO_OF_FOUR is FORMATS["two-of-four"]


def test_the_bytes_of_one_small_weight() -> None:
    """Worked out by hand from the format page: 4 bits, one group, of the last four inputs one is missing."""
    spec = QuantSpec(4, WHOLE_ROW, symmetric=True, two_of_four=True)
    codes = torch.tensor([[8, 1, 8, 2, 3, 8, 4]], dtype=torch.uint8)
    tensor = QTensor(spec, codes, torch.tensor([[0.5]]).half(), kept=codes != 8)
    parts = TWO_OF_FOUR.pack(tensor)
    assert parts["qweight"].tolist() == [[0x21, 0x43]]
    assert parts["places"].tolist() == [[0b10_00_11_01]]
    assert TWO_OF_FOUR.unpack(parts, spec, (1, 7)).dequantize().tolist() == [[0, -3.5, 0, -3, -2.5, 0, -2]]


def test_places_that_do_not_rise_are_refused() -> None:
    spec = QuantSpec(4, 8, two_of_four=True)
    parts = TWO_OF_FOUR.pack(random_qtensor(spec, (4, 16)))
    parts["places"][0, 0] = 0
    with pytest.raises(CheckpointError, match=r"places of a weight \(4, 16\) do not rise"):
        TWO_OF_FOUR.unpack(parts, spec, (4, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_is_that_of_the_unpacked_weight(dtype: torch.dtype) -> None:
    spec, shape = QuantSpec(4, 32, two_of_four=True), (33, 96)
    tensor = random_qtensor(spec, shape)
    dense = QTensor(QuantSpec(4, 32), tensor.codes, tensor.scales, tensor.zeros)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    kernel = choose(spec, shape, x.device, dtype).kernel
    assert kernel is REFERENCE
    expected = REFERENCE.run(x, REFERENCE.prepare(DENSE.pack(dense), dense.spec, shape, dtype))
    assert torch.equal(kernel.run(x, kernel.prepare(TWO_OF_FOUR.pack(tensor), spec, shape, dtype)), expected)


def test_combinations_without_sense_are_refused() -> None:
    for others in ({"grouping": "per_ic"}, {"wide_rows": 3}, {"sparsity": 0.5, "group_size": 16}):
        with pytest.raises(UsageError, match="two of four weights are dropped, which needs per_oc groups"):
            QuantSpec(**{"bits": 4, "group_size": 64, "two_of_four": True, **others})
    with pytest.raises(UsageError, match="two_of_four is 1, but it is either true or false"):
        QuantSpec(two_of_four=1)  # type: ignore[arg-type]
