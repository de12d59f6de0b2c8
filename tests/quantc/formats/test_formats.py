"""Every storage format: what is packed is what `layout` says, and unpacks to the same bits."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import FORMATS, format_of
from quantc.numerics.groups import spread_groups
from quantc.numerics.qtensor import QTensor
from quantc.spec import WHOLE_ROW, QuantSpec

SPECS = [
    QuantSpec(bits, group, grouping, symmetric, rank)
    for bits in range(2, 9)
    for group, rank in ((8, 0), (5, 2), (WHOLE_ROW, 0))
    for grouping in ("per_oc", "per_ic")
    for symmetric in (False, True)
]
SHAPES = [(1, 1), (7, 13), (16, 32), (9, 70)]
LEADING = [(), (3,), (2, 2)]


def random_qtensor(spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = (), seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    n, k = shape
    groups = (*leading, *spec.scales_shape(shape))

    def codes(size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, spec.levels, size, dtype=torch.uint8, generator=generator)

    def halves(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).half()

    return QTensor(
        spec,
        codes((*leading, n, k)),
        halves(*groups),
        None if spec.symmetric else codes(groups),
        halves(*leading, spec.rank, k) if spec.rank else None,
        halves(*leading, n, spec.rank) if spec.rank else None,
    )


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_pack_follows_the_layout_and_unpacks_exactly(spec: QuantSpec, leading: tuple[int, ...]) -> None:
    storage = format_of(spec)
    assert FORMATS[storage.name] is storage
    for shape in SHAPES:
        tensor = random_qtensor(spec, shape, leading)
        parts = storage.pack(tensor)
        layout = storage.layout(spec, shape, leading)
        assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == {
            key: (part.dtype, part.shape) for key, part in layout.items()
        }
        again = storage.unpack(parts, spec, shape)
        for field in ("codes", "scales", "zeros", "low_rank_a", "low_rank_b"):
            before, after = getattr(tensor, field), getattr(again, field)
            assert (before is None) == (after is None), field
            assert before is None or (before.dtype == after.dtype and torch.equal(before, after)), field
        assert torch.equal(again.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_a_stack_packs_like_its_members(spec: QuantSpec) -> None:
    storage, shape = format_of(spec), (7, 13)
    stack = random_qtensor(spec, shape, (3,))
    whole = storage.pack(stack)
    for index in range(3):
        one = storage.unpack({key: part[index] for key, part in whole.items()}, spec, shape)
        assert torch.equal(one.dequantize(), stack.dequantize()[index])
        assert torch.equal(one.effective_weight(), stack.effective_weight()[index])
        for key, part in storage.pack(one).items():
            assert torch.equal(part, whole[key][index])


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_dequantize_is_code_minus_zero_times_scale(spec: QuantSpec) -> None:
    n, k = shape = (7, 13)
    tensor = random_qtensor(spec, shape)
    g = spec.group_length(shape)
    found = tensor.dequantize(torch.float64)
    for row in range(n):
        for column in range(k):
            group = (row, column // g) if spec.grouping == "per_oc" else (row // g, column)
            zero = spec.mid if tensor.zeros is None else int(tensor.zeros[group])
            expected = (int(tensor.codes[row, column]) - zero) * float(tensor.scales[group])
            assert found[row, column] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantize_casts_last(dtype: torch.dtype) -> None:
    tensor = random_qtensor(QuantSpec(8, 8), (4, 16))
    assert torch.equal(tensor.dequantize(dtype), tensor.dequantize(torch.float64).to(dtype))


def test_low_rank_is_part_of_the_effective_weight_only() -> None:
    tensor = random_qtensor(QuantSpec(4, 8, rank=2), (6, 16))
    assert tensor.low_rank_a is not None
    assert tensor.low_rank_b is not None
    extra = tensor.low_rank_b.double() @ tensor.low_rank_a.double()
    torch.testing.assert_close(tensor.effective_weight().double(), tensor.dequantize(torch.float64) + extra)


def test_groups_spread_to_the_odd_end() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0]])
    assert spread_groups(values, QuantSpec(4, 2).groups, (1, 5)).tolist() == [[1, 1, 2, 2, 3]]
    assert spread_groups(values.T, QuantSpec(4, 2, "per_ic").groups, (5, 1)).tolist() == [[1], [1], [2], [2], [3]]
