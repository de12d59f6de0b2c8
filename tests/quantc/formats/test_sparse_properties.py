"""Weights of which some are dropped, of any shape and share: exact bytes, exact codes, and the very product."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from quantc.formats import format_of
from quantc.kernels.reference import REFERENCE
from quantc.numerics.groups import spread_groups
from quantc.numerics.qtensor import QTensor
from quantc.numerics.sparsity import by_magnitude
from quantc.spec import SPARSE_GROUPS, WHOLE_ROW, QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """None of the groups dropped (so few that it rounds to that), all, and any share between; or two of four."""
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    if draw(st.booleans()):
        group = draw(st.sampled_from((WHOLE_ROW, 1, 4, 5, 16, 64)))
        return QuantSpec(bits, group, symmetric=symmetric, two_of_four=True)
    share = draw(st.one_of(st.sampled_from((1e-9, 0.5, 1.0)), st.floats(0.01, 1.0)))
    return QuantSpec(bits, draw(st.sampled_from(SPARSE_GROUPS)), symmetric=symmetric, sparsity=share)


@st.composite
def weights(draw: st.DrawFn) -> QTensor:
    """Random codes where weights stay. Rows lose all of their groups before the next one does, or any."""
    spec, shape = draw(specs()), (draw(st.integers(1, 40)), draw(st.integers(1, 200)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    sizes = torch.rand(shape, generator=generator) + 0.1
    if draw(st.booleans()):
        sizes *= 1 + 1000 * torch.arange(shape[0]).unsqueeze(1)
    stays = by_magnitude(sizes, spec)
    kept = stays if spec.two_of_four else stays[:, :: spec.group_length(shape)]
    groups = spec.scales_shape(shape)
    zeros = torch.randint(0, spec.levels, groups, dtype=torch.uint8, generator=generator)
    scales = torch.randn(groups, generator=generator).half()
    if spec.sparsity:
        zeros, scales = zeros.masked_fill(~kept, 0), scales.masked_fill(~kept, 1)
    middles = spread_groups(torch.full_like(zeros, spec.mid) if spec.symmetric else zeros, spec.groups, shape)
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    return QTensor(spec, torch.where(stays, codes, middles), scales, None if spec.symmetric else zeros, kept=kept)


@settings(max_examples=200, deadline=None)
@given(tensor=weights())
def test_what_is_stored_is_what_was_counted_and_comes_back(tensor: QTensor) -> None:
    spec, shape, form = tensor.spec, tensor.shape, format_of(tensor.spec)
    parts = form.pack(tensor)
    layout = form.layout(spec, shape)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        name: (part.dtype, tuple(part.shape)) for name, part in layout.items()
    }
    assert spec.stored_bits(shape) == 8 * sum(part.nbytes for part in parts.values())
    assert tensor.kept is not None
    n, k = shape
    of_row = sum(min(2, k - first) for first in range(0, k, 4))
    assert int(tensor.kept.sum()) == (n * of_row if spec.two_of_four else spec.kept_groups(shape))
    again = form.unpack(parts, spec, shape)
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert torch.equal(again.codes, tensor.codes)
    packed_again = form.pack(again)
    assert all(torch.equal(packed_again[name], part) for name, part in parts.items())


@settings(max_examples=100, deadline=None)
@given(tensor=weights(), rows=st.integers(0, 5), dtype=st.sampled_from(DTYPES))
def test_the_product_is_the_dense_one_of_the_unpacked_weight(tensor: QTensor, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, tensor.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    prepared = REFERENCE.prepare(format_of(tensor.spec).pack(tensor), tensor.spec, tensor.shape, dtype)
    y = REFERENCE.run(x, prepared)
    assert torch.equal(y, F.linear(x, tensor.dequantize(dtype)))
    stays = tensor.stays()
    assert stays is not None
    assert not y[:, ~stays.any(1)].any()
