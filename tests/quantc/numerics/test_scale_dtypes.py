"""Scales with values of bfloat16: float16 holds each, whatever chooses or trains it, and codes make up for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantc.numerics.basis import Basis
from quantc.numerics.grids import fit_grid
from quantc.numerics.grids.scale_dtypes import LARGEST, to_stored, within_range
from quantc.numerics.qtensor import QTensor
from quantc.numerics.refine import refine
from quantc.numerics.relaxed import relax
from quantc.numerics.rounding import round_to_nearest
from quantc.numerics.statistics import channel_energies
from quantc.spec import QuantSpec

SPECS = [
    QuantSpec(8, 32, symmetric=True, scale_dtype="bfloat16"),
    QuantSpec(4, 32, scale_dtype="bfloat16"),
    QuantSpec(4, 8, "per_ic", scale_dtype="bfloat16"),
    QuantSpec(8, -1, code="fp8", scale_dtype="bfloat16"),
    QuantSpec(4, 32, code="nf4", scale_dtype="bfloat16"),
]


def fits(scales: torch.Tensor) -> bool:
    return scales.dtype == torch.float16 and torch.equal(scales.to(torch.bfloat16).half(), scales)


def rounded(weight: torch.Tensor, spec: QuantSpec, gram: torch.Tensor, rounds: int = 0) -> QTensor:
    return Basis.of(gram, 1 << 20, 0, 0.01, True).round(weight, spec, rounds)


def weight_and_gram() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    return torch.randn(64, 96, generator=generator) * 0.02, inputs.T @ inputs


def test_every_scale_is_one_that_both_dtypes_have() -> None:
    spread = torch.logspace(-9, 6, 20_000) * torch.tensor([1.0, -1.0]).repeat(10_000)
    found = within_range(spread, "bfloat16")
    assert fits(found)
    assert bool((found != 0).all() and torch.isfinite(found).all())
    assert float(found.abs().max()) == LARGEST["bfloat16"]
    normal = (spread.abs() > 2.0**-14) & (spread.abs() < LARGEST["bfloat16"])
    assert float((found[normal].float() / spread[normal] - 1).abs().max()) <= 2.0**-8
    assert torch.equal(within_range(torch.zeros(1), "bfloat16"), torch.zeros(1, dtype=torch.float16))
    assert bool(torch.isinf(to_stored(torch.tensor(65_500.0), "bfloat16")))


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_scales_stay_so_whatever_chooses_them(spec: QuantSpec) -> None:
    weight, gram = weight_and_gram()
    parameters = fit_grid(weight, spec)
    assert fits(parameters.scales)
    codes = round_to_nearest(weight, parameters, spec)
    _, refined = refine(weight, codes, parameters, spec, gram, 2)
    assert not torch.equal(refined.scales, parameters.scales)
    assert fits(refined.scales)
    trained = relax(QTensor.of(spec, codes, parameters), weight)
    assert trained.factors is not None
    torch.nn.init.uniform_(trained.factors, -0.05, 0.05)
    assert fits(trained.qtensor().scales)
    moved = trained.qtensor().dequantize()
    assert torch.allclose(trained().detach(), moved)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_make_up_for_scales_that_are_rounded_before(bits: int) -> None:
    """At 8 bits what a reader rounds off scales adds a quarter to the error; rounded first, they cost little."""
    weight, gram = weight_and_gram()
    spec = QuantSpec(bits, 32, symmetric=True)
    plain = rounded(weight, spec, gram)
    after = replace(plain, scales=plain.scales.to(torch.bfloat16).half())
    before = rounded(weight, spec.with_scales("bfloat16"), gram)
    errors = [float(channel_energies(each.dequantize() - weight, gram).sum()) for each in (plain, before, after)]
    assert errors[1] < errors[2]
    assert errors[1] < errors[0] * 1.1
    if bits == 8:
        assert errors[2] > errors[0] * 1.2


def test_the_unit_of_nvfp4_is_a_power_of_two() -> None:
    """Scales are then values of bfloat16, which readers compute in; over 20 draws that changed nothing on average."""
    weight, gram = weight_and_gram()
    spec = QuantSpec(4, 16, code="nvfp4")
    plain, coarse = (rounded(weight, each, gram) for each in (spec, spec.with_scales("bfloat16")))
    unit = coarse.more["tensor_scale"]
    assert torch.equal(torch.frexp(unit).mantissa, torch.tensor([0.5]))
    assert 0 <= float(torch.log2(unit / plain.more["tensor_scale"])) < 1
    values = coarse.dequantize()
    assert torch.equal(values.to(torch.bfloat16).float(), values)
    errors = [float(channel_energies(each.dequantize() - weight, gram).sum()) for each in (plain, coarse)]
    assert errors[1] < errors[0] * 1.1
    zeros = fit_grid(torch.zeros(4, 32), spec.with_scales("bfloat16"))
    assert float(zeros.more["tensor_scale"]) == 1


def test_only_float16_scales_have_a_choice() -> None:
    assert QuantSpec(4, 32, code="mxfp4").with_scales("bfloat16").scale_dtype == "float16"
    spec = QuantSpec(4, 64).with_scales("bfloat16")
    assert spec.label() == "w4g64"
    assert spec.grid.scale_dtype == "bfloat16"
    assert spec.as_stored() == QuantSpec(4, 64)
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert "scale_dtype" not in spec.as_stored().to_dict()
