"""Slices of quantized weights: what they represent is the slice of what the whole represents, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantc.formats import format_of
from quantc.numerics.grids import fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.numerics.slices import obstacle, slice_inputs, slice_outputs
from quantc.numerics.sparsity import by_magnitude
from quantc.spec import GRIDS, WHOLE_ROW, Fixed, QuantSpec, Uniform

SHAPE = (64, 512)
CODES = [
    QuantSpec(kind.width, kind.block or kind.usual_group, code=name)
    for name, kind in GRIDS.items()
    if issubclass(kind, Fixed)
]
SPECS = [
    QuantSpec(4, 64),
    QuantSpec(3, 32, symmetric=True),
    QuantSpec(4, WHOLE_ROW, symmetric=True),
    QuantSpec(2, 16, "per_ic"),
    QuantSpec(4, WHOLE_ROW, "per_ic"),
    QuantSpec(4, 64, rank=3),
    QuantSpec(4, 64, wide_rows=20),
    QuantSpec(3, 64, symmetric=True, wide_rows=32),
    QuantSpec(4, 64, two_of_four=True),
    QuantSpec(3, WHOLE_ROW, rank=2, code="trellis"),
    *CODES,
]


def quantized(spec: QuantSpec) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    parameters = fit_grid(weight, spec)
    tensor = QTensor.of(spec, round_to_nearest(weight, parameters, replace(spec, wide_rows=0)), parameters)
    if spec.wide_rows:
        tensor.wide = torch.arange(SHAPE[0]) < spec.wide_rows  # one half all wide, or none of it
    if spec.two_of_four:
        tensor.kept = by_magnitude(weight, spec)
        tensor.codes = torch.where(tensor.kept, tensor.codes, tensor.zero_points().to(torch.uint8))
    if spec.rank:
        tensor.low_rank_a = torch.randn(spec.rank, SHAPE[1], generator=generator).half()
        tensor.low_rank_b = torch.randn(SHAPE[0], spec.rank, generator=generator).half()
    return tensor


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_a_slice_represents_what_it_did_and_is_stored_as_a_weight_of_its_own(spec: QuantSpec, along: int) -> None:
    whole, cut = quantized(spec), (slice_outputs, slice_inputs)[along]
    half = SHAPE[along] // 2
    for start, stop in ((0, half), (half, SHAPE[along]), (0, SHAPE[along])):
        found = obstacle(spec, SHAPE, along, start, stop)
        if found is not None:
            assert spec.code == "nf4_dq" or (spec.code == "trellis" and along == 0)
            continue
        part = cut(whole, start, stop)
        torch.testing.assert_close(
            part.effective_weight(), whole.effective_weight().narrow(along, start, stop - start), rtol=0, atol=1e-6
        )
        storage = format_of(part.spec)
        again = storage.unpack(storage.pack(part), part.spec, part.shape)
        assert torch.equal(again.dequantize(), whole.dequantize().narrow(along, start, stop - start))


def test_rotated_outputs_are_sliced_and_rotated_inputs_are_not() -> None:
    spec = QuantSpec(4, 64, hadamard=512)
    whole = quantized(spec)
    part = slice_outputs(whole, 32, 64)
    torch.testing.assert_close(part.effective_weight(), whole.effective_weight()[32:])
    assert "rotates all of its inputs" in str(obstacle(spec, SHAPE, 1, 0, 256))


@pytest.mark.parametrize(
    ("spec", "along", "start", "stop", "reason"),
    [
        (QuantSpec(4, 128), 1, 0, 192, "groups of 128, and a slice ends inside one; .* --group-size 64"),
        (QuantSpec(4, 128), 1, 192, 512, "ends inside one"),
        (QuantSpec(4, 48, "per_ic"), 0, 0, 56, "groups of 48"),
        (QuantSpec(4, 256, code="q4_k"), 1, 0, 128, "groups of 256"),
        (QuantSpec(4, 32, sparsity=0.5), 0, 0, 32, "dropped groups"),
        (QuantSpec(4, 64, two_of_four=True), 1, 0, 62, "inside four"),
        (QuantSpec(4, 64, code="nf4_dq"), 0, 0, 32, "nf4_dq"),
        (QuantSpec(3, WHOLE_ROW, code="trellis"), 0, 0, 32, "tiles of 64 outputs, .* --code grid"),
    ],
)
def test_what_cannot_be_sliced_is_told_with_what_can(
    spec: QuantSpec, along: int, start: int, stop: int, reason: str
) -> None:
    found = obstacle(spec, SHAPE, along, start, stop)
    assert found is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(found)


def test_whole_tiles_of_a_trellis_are_weights_of_their_own() -> None:
    spec, weight = QuantSpec(2, WHOLE_ROW, code="trellis"), torch.randn(192, 8)
    parameters = fit_grid(weight, spec)
    whole = QTensor.of(spec, round_to_nearest(weight, parameters, spec), parameters)
    for start, stop in ((0, 64), (64, 192)):
        assert obstacle(spec, (192, 8), 0, start, stop) is None
        part = slice_outputs(whole, start, stop)
        again = format_of(spec).unpack(format_of(spec).pack(part), spec, part.shape)
        assert torch.equal(again.dequantize(), whole.dequantize()[start:stop])
    assert obstacle(replace(spec, wide_rows=64), (192, 8), 0, 0, 64)


def test_a_slice_inside_one_group_is_one_group() -> None:
    whole = quantized(QuantSpec(4, 512))
    part = slice_inputs(whole, 100, 300)
    assert part.spec.group_size == WHOLE_ROW
    assert isinstance(part.spec.grid, Uniform)
    assert torch.equal(part.dequantize(), whole.dequantize()[:, 100:300])
