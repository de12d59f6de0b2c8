"""Prepared weights with dropped groups: every kept group lies where include/kept.cuh says, and little else is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from quantc.errors import CheckpointError
from quantc.formats import GROUP_SPARSE
from quantc.kernels.cuda import kept_layout
from quantc.kernels.cuda.kept_layout import KeptWeight, most_groups
from quantc.kernels.cuda.layout import CODE_BITS, LOWER_PLANE, high_place, low_place
from quantc.numerics.qtensor import QTensor
from quantc.spec import SPARSE_GROUPS, QuantSpec
from tests.kernels.cuda.kept_weights import prepare, random_kept

IN_STEP = 128


@dataclass
class Found:
    """A group as the kernels read it, codes as int."""

    row: int
    column: int
    scale: float
    zero: int
    codes: list[int]


def code_at(weight: KeptWeight, step: int, row: int, k: int) -> int:
    """Of input k (of 128) in a step, by the sentences of kept.cuh and codes.cuh."""
    bits = weight.variant.bits
    pair, lane, which = k // 16 * 2 + k % 4 // 2, 4 * row + k % 16 // 4, k % 2
    low = LOWER_PLANE[bits]
    planes = [(low, 0, 0, low_place(pair, low))]
    if bits > low:
        planes.append((bits - low, low, low, high_place(pair, bits)))
    vector = weight.codes.shape[-1]
    code = 0
    for width, first, shift, (word, bit) in planes:
        at = word + first
        value = int(weight.codes[step, at // vector, lane, at % vector]) & 0xFFFFFFFF
        code |= (value >> (16 * which + bit) & ((1 << width) - 1)) << shift
    return code


def groups_of(weight: KeptWeight) -> Iterator[Found]:
    """All groups in the order of memory, empty ones too."""
    group, bits = weight.variant.group, weight.variant.bits
    for octet, (start, end) in enumerate(zip(weight.starts.tolist()[:-1], weight.starts.tolist()[1:], strict=True)):
        for step in range(start, end):
            assert int(weight.owners[step]) == 2 * octet + (step == end - 1)
            for row in range(8):
                for number in range(IN_STEP // group):
                    half, place = (number % 2, number // 2) if group == 8 else (0, number)
                    word = int(weight.groups[step, row, half, place]) & 0xFFFFFFFF
                    column = word >> 16
                    if weight.zeros is None:
                        zero, column = column & 0xF, column >> 4
                    else:
                        zero = int(weight.zeros[step, row, half, place])
                    scale = torch.tensor(word & 0xFFFF, dtype=torch.int32).to(torch.int16).view(torch.float16)
                    codes = [code_at(weight, step, row, number * group + k) for k in range(group)]
                    assert max(codes) < 1 << bits
                    yield Found(int(weight.rows[octet, row]), column, float(scale), zero, codes)


def check(tensor: QTensor) -> int:
    """Every kept group is there once, in order; returns how many are empty."""
    spec, weight = tensor.spec, prepare(tensor)
    assert tensor.kept is not None
    left = {row: kept.nonzero().flatten().tolist() for row, kept in enumerate(tensor.kept)}
    empty = 0
    for found in groups_of(weight):
        if found.column == tensor.kept.shape[1]:
            empty += 1
            assert found.scale == 0
            assert found.codes == [0] * spec.group_size
            continue
        assert left[found.row].pop(0) == found.column
        codes = tensor.codes[found.row, found.column * spec.group_size :][: spec.group_size].tolist()
        assert found.codes == codes + [0] * (spec.group_size - len(codes))
        assert found.scale == float(tensor.scales[found.row, found.column])
        assert found.zero == (spec.mid if tensor.zeros is None else int(tensor.zeros[found.row, found.column]))
    assert not any(left.values())
    assert sorted(row for row in weight.rows.flatten().tolist() if row < tensor.shape[0]) == list(left)
    return empty


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_groups_lie_where_the_kernels_look(bits: int, uneven: bool) -> None:
    for group in SPARSE_GROUPS:
        check(random_kept(QuantSpec(bits, group, symmetric=bits == 6, sparsity=0.6), (11, 200), uneven))


@pytest.mark.parametrize(("sparsity", "empty"), [(1e-9, 0), (1.0, 128)])
def test_all_groups_and_none(sparsity: float, empty: int) -> None:
    """A step for each octet where there is nothing: who writes its rows is found in the steps."""
    assert check(random_kept(QuantSpec(4, 16, sparsity=sparsity), (16, 256))) == empty


def test_a_row_shorter_than_a_group() -> None:
    check(random_kept(QuantSpec(4, 32, sparsity=0.5), (9, 24)))


def test_many_steps_are_arranged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_kept(QuantSpec(3, 16, sparsity=0.5), (40, 520))
    whole = prepare(tensor).codes
    monkeypatch.setattr(kept_layout, "STEPS_AT_ONCE", 3)
    assert len(whole) > 6
    assert torch.equal(prepare(tensor).codes, whole)


@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_read_grows_with_the_groups_that_stay_however_uneven_rows_are(uneven: bool) -> None:
    steps = [
        len(prepare(random_kept(QuantSpec(4, 16, sparsity=sparsity), (512, 4096), uneven)).owners)
        for sparsity in (1e-9, 0.5, 0.9)
    ]
    assert steps[0] == 2048
    assert 0.5 <= steps[1] / steps[0] < 0.54
    assert 0.1 <= steps[2] / steps[0] < 0.14


def test_an_index_that_marks_too_many_groups_is_refused() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (8, 64))
    parts = GROUP_SPARSE.pack(tensor)
    parts["kept"][:] = 255
    with pytest.raises(CheckpointError, match="marks 32 groups"):
        kept_layout.prepare(parts, tensor.spec, tensor.shape)


@pytest.mark.parametrize("bits", [4, 5])
def test_the_last_column_has_a_number(bits: int) -> None:
    """Of the longest row, one input shy of a group where columns share their word with zero points."""
    columns = most_groups(bits) if bits == 4 else 5000
    spec = QuantSpec(bits, 8, sparsity=1 - 1 / columns)
    tensor = random_kept(spec, (1, 8 * columns))
    assert tensor.kept is not None
    tensor.kept[:] = False
    tensor.kept[0, -1] = True
    tensor.zeros = torch.full_like(tensor.scales, 15, dtype=torch.uint8)
    found = next(groups_of(prepare(tensor)))
    assert (found.column, found.zero) == (columns - 1, 15)
    assert sum(1 for group in groups_of(prepare(tensor)) if group.column == columns) == 127
