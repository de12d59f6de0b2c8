"""Weights that can be trained: what they start from, where they may go, and what is stored."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.basis import Basis
from quantc.numerics.groups import spread_groups
from quantc.numerics.hadamard import rotate, rotate_back
from quantc.numerics.qtensor import QTensor
from quantc.numerics.relaxed import RelaxedWeight, rescaled, with_scales
from quantc.spec import QuantSpec

SPECS = [
    QuantSpec(3, 16),
    QuantSpec(2, -1, symmetric=True),
    QuantSpec(4, 8, grouping="per_ic"),
    QuantSpec(3, 24, hadamard=8),
    QuantSpec(4, 16, rank=2),
    QuantSpec(3, 16, wide_rows=7),
    QuantSpec(2, 8, symmetric=True, wide_rows=24),
]


def relaxed(spec: QuantSpec, shape: tuple[int, int] = (24, 40), seed: int = 0) -> RelaxedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    turned = rotate(weight.double(), spec.hadamard).float() if spec.hadamard else weight
    wide = torch.arange(shape[0]) < spec.wide_rows if spec.wide_rows else None
    tensor = Basis.unguided(None, 0, 0).round(turned, spec, wide=wide)
    if spec.rank:
        n, k = shape
        tensor.low_rank_a = torch.randn(spec.rank, k, generator=generator).half()
        tensor.low_rank_b = torch.randn(n, spec.rank, generator=generator).half()
    return RelaxedWeight(tensor, turned)


def equal(one: QTensor, other: QTensor) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label())
def test_it_starts_as_what_was_rounded(spec: QuantSpec) -> None:
    weight = relaxed(spec)
    assert torch.allclose(weight(), weight.tensor.effective_weight(), atol=1e-6)
    assert equal(weight.qtensor(), weight.tensor)


def test_codes_that_error_feedback_moved_start_as_they_are() -> None:
    weight = relaxed(QuantSpec(3, 16))
    generator = torch.Generator().manual_seed(1)
    moved = torch.randint(0, 8, weight.tensor.codes.shape, generator=generator).to(torch.uint8)
    tensor = QTensor(weight.tensor.spec, moved, weight.tensor.scales, weight.tensor.zeros)
    assert equal(RelaxedWeight(tensor, torch.randn(24, 40, generator=generator)).qtensor(), tensor)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label())
def test_what_runs_is_what_is_stored_wherever_training_goes(spec: QuantSpec) -> None:
    weight = relaxed(spec)
    with torch.no_grad():
        weight.offsets.copy_(3 * torch.randn(weight.offsets.shape, generator=torch.Generator().manual_seed(2)))
        weight.factors.copy_(0.1 * torch.randn(weight.factors.shape, generator=torch.Generator().manual_seed(3)))
    weight.clamp_offsets()
    stored = weight.qtensor()
    assert torch.allclose(weight(), stored.effective_weight(), atol=1e-6)
    assert int((stored.codes.int() - weight.tensor.codes.int()).abs().max()) == 1
    assert bool((stored.codes <= stored.levels() - 1).all())
    assert not equal(stored, weight.tensor)


def test_gradients_pass_through_rounding() -> None:
    weight = relaxed(QuantSpec(3, 16))
    wanted = torch.randn(24, 40, generator=torch.Generator().manual_seed(4))
    (weight() - wanted).square().mean().backward()
    assert weight.offsets.grad is not None
    assert weight.factors.grad is not None
    assert bool((weight.offsets.grad != 0).float().mean() > 0.9)
    assert bool((weight.factors.grad != 0).all())


def test_experts_are_trained_as_one_stack() -> None:
    parts = [relaxed(QuantSpec(3, 16), seed=seed) for seed in (0, 1)]
    tensors = [part.tensor for part in parts]
    zeros = [tensor.zeros for tensor in tensors]
    assert zeros[0] is not None
    assert zeros[1] is not None
    stack = QTensor(
        tensors[0].spec,
        torch.stack([tensor.codes for tensor in tensors]),
        torch.stack([tensor.scales for tensor in tensors]),
        torch.stack([zeros[0], zeros[1]]),
    )
    both = RelaxedWeight(stack, torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(5)))
    assert torch.allclose(both(), torch.stack([part() for part in parts]), atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label())
def test_gradients_are_those_of_the_weight_without_rounding(spec: QuantSpec) -> None:
    """As autograd finds them through (code + offset - zero) (1 + factor) scale, rotated back."""
    weight = relaxed(spec)
    tensor, generator = weight.tensor, torch.Generator().manual_seed(6)
    slopes = torch.randn(tensor.shape, generator=generator)
    (weight() * slopes).sum().backward()
    found = [parameter.grad.clone() for parameter in weight.parameters() if parameter.grad is not None]
    weight.zero_grad()
    steps = tensor.codes.float() - tensor.zero_points() + (weight.offsets - weight.offsets.detach())
    scales = spread_groups(tensor.scales.float() * (1 + weight.factors), spec.groups, tensor.shape)
    turned = steps * scales
    (rotate_back(turned, spec.hadamard) * slopes if spec.hadamard else turned * slopes).sum().backward()
    for parameter, gradient in zip(weight.parameters(), found, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-3, atol=1e-6)


def test_codes_at_an_end_of_their_range_come_back_as_soon_as_they_are_pulled() -> None:
    weight = relaxed(QuantSpec(3, 16))
    top = weight.tensor.codes == 7
    assert bool(top.any())
    with torch.no_grad():
        weight.offsets.fill_(5.0)
        weight.clamp_offsets()
        assert torch.equal(weight.codes(weight.offsets), (weight.tensor.codes + 1.0).clamp_(max=7))
        weight.offsets.sub_(1)
    assert bool((weight.codes(weight.offsets)[top] == 6).all())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label())
def test_rescaled_weights_are_what_is_stored_and_have_the_gradient_of_their_formula(spec: QuantSpec) -> None:
    tensor = relaxed(spec).tensor
    generator = torch.Generator().manual_seed(5)
    factors = torch.nn.Parameter(0.1 * torch.randn(tensor.scales.shape, generator=generator))
    wanted = torch.randn(24, 40, generator=generator)
    weight = rescaled(tensor, factors)
    assert torch.allclose(weight, with_scales(tensor, factors.detach()).effective_weight(), atol=1e-6)
    (weight * wanted).sum().backward()
    plain = factors.detach().clone().requires_grad_()
    scales = spread_groups(tensor.scales.float() * (1 + plain), spec.groups, (24, 40))
    turned = (tensor.codes.float() - tensor.zero_points()) * scales
    ((rotate_back(turned, spec.hadamard) if spec.hadamard else turned) * wanted).sum().backward()
    assert factors.grad is not None
    assert torch.allclose(factors.grad, plain.grad, atol=1e-5)
