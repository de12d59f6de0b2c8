"""Refinement and training on GGUF's block types: scales and minima of blocks move, sub-scales stay."""

from __future__ import annotations

import pytest
import torch

from quantc.numerics.basis import Basis
from quantc.numerics.grids import arithmetic_of, fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.refine import refine, refit
from quantc.numerics.relaxed import RelaxedWeight, RescaledWeight, relax, rescaled, with_scales
from quantc.numerics.rounding import factorize, gptq
from quantc.spec import GRIDS, Ggml, QuantSpec

N, K = 12, 512
NAMES = sorted(name for name, grid in GRIDS.items() if issubclass(grid, Ggml))
EVEN = [name for name in NAMES if "codes" in GRIDS[name].trainable]


def spec_of(name: str) -> QuantSpec:
    grid = GRIDS[name]
    assert issubclass(grid, Ggml)
    return QuantSpec(grid.width, grid.block, code=name)


def weight_of(seed: int = 0) -> torch.Tensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    weight[3, :256] = 0
    weight[4, 40] = 9
    return weight


def rounded(name: str, seed: int = 0) -> tuple[torch.Tensor, QTensor]:
    weight = weight_of(seed)
    return weight, Basis.unguided(None, 0, 0).round(weight, spec_of(name))


def equal(one: QTensor, other: QTensor) -> bool:
    more = all(torch.equal(one.more[name], other.more[name]) for name in one.more)
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales) and more


def objective(tensor: QTensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    difference = (tensor.dequantize() - weight).double()
    return float((difference @ gram.double() * difference).sum())


@pytest.mark.parametrize("name", NAMES)
def test_refinement_lowers_the_objective_that_error_feedback_left(name: str) -> None:
    weight, spec, generator = weight_of(), spec_of(name), torch.Generator().manual_seed(1)
    mix = torch.randn(64, K, generator=generator)
    rows = torch.randn(2048, 64, generator=generator) @ mix + 2 * torch.randn(2048, K, generator=generator)
    gram = rows.T @ rows / len(rows)
    parameters = fit_grid(weight, spec, gram.diagonal())
    codes = gptq(weight, factorize(gram), parameters, spec)
    before = objective(QTensor.of(spec, codes, parameters), weight, gram)
    fitted = objective(QTensor.of(spec, codes, refit(weight, codes, parameters, spec, gram)), weight, gram)
    tensor = QTensor.of(spec, *refine(weight, codes, parameters, spec, gram, 2))
    after = objective(tensor, weight, gram)
    assert after < 0.95 * before
    assert after < fitted < before
    for part in ("sub_scales", "sub_minima"):
        assert part not in tensor.more or torch.equal(tensor.more[part], parameters.more[part])
    assert int(tensor.codes.min()) >= spec.grid.least_code


@pytest.mark.parametrize("name", EVEN)
def test_training_starts_as_what_was_rounded_and_ends_as_what_is_stored(name: str) -> None:
    weight, tensor = rounded(name)
    trained = RelaxedWeight(tensor, weight)
    assert torch.allclose(trained(), tensor.dequantize(), atol=1e-5)
    assert equal(trained.qtensor(), tensor)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        trained.offsets.copy_(3 * torch.randn(trained.offsets.shape, generator=generator))
        trained.factors.copy_(0.1 * torch.randn(trained.factors.shape, generator=generator))
    trained.clamp_offsets()
    stored = trained.qtensor()
    assert torch.allclose(trained(), stored.dequantize(), atol=1e-5)
    assert int((stored.codes.int() - tensor.codes.int()).abs().max()) == 1
    assert tensor.spec.grid.least_code <= int(stored.codes.min())
    assert int(stored.codes.max()) < stored.spec.levels
    assert not equal(stored, tensor)
    assert ("minima" in tensor.more) == (not torch.equal(stored.dequantize(), without_minima(stored, tensor)))


def without_minima(stored: QTensor, tensor: QTensor) -> torch.Tensor:
    """The weight with the minima that it had before."""
    minima = {"minima": tensor.more["minima"]} if "minima" in tensor.more else {}
    return QTensor(stored.spec, stored.codes, stored.scales, more={**stored.more, **minima}).dequantize()


@pytest.mark.parametrize("name", EVEN)
def test_gradients_are_slopes(name: str) -> None:
    """The value of a weight is linear in each number; a step of one number changes it as its gradient says."""
    weight, tensor = rounded(name, seed=3)
    trained = RelaxedWeight(tensor, weight)
    slopes = torch.randn(N, K, generator=torch.Generator().manual_seed(4))
    (trained() * slopes).sum().backward()
    assert trained.offsets.grad is not None
    assert trained.factors.grad is not None
    one = QTensor.of(tensor.spec, tensor.codes ^ 1, tensor.parameters)  # every code goes to a neighbour
    moved = (one.codes.float() - tensor.codes.float()) * trained.offsets.grad
    torch.testing.assert_close(moved, (one.dequantize() - tensor.dequantize()) * slopes, rtol=1e-4, atol=1e-5)
    for part in range(len(trained.factors)):
        factors = torch.zeros_like(trained.factors)
        factors[part] = 1  # twice the number, which float16 holds
        change = ((with_scales(tensor, factors).dequantize() - tensor.dequantize()) * slopes).sum(1)
        torch.testing.assert_close(trained.factors.grad[part].sum(1), change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_scales_alone_are_trained_in_place(name: str) -> None:
    weight, tensor = rounded(name)
    factors = torch.zeros(1 + ("minima" in tensor.more), *tensor.scales.shape, requires_grad=True)
    found = rescaled(tensor, factors)
    assert torch.allclose(found, tensor.dequantize(), atol=1e-5)
    (found * weight).sum().backward()
    assert factors.grad is not None
    assert bool((factors.grad != 0).any(-1).any(-1).all())
    assert isinstance(relax(tensor, weight), RelaxedWeight if name in EVEN else RescaledWeight)


def test_stacks_of_experts_are_trained_at_once() -> None:
    each = [rounded("q4_k", seed) for seed in (0, 1)]
    tensors = [tensor for _, tensor in each]
    more = {name: torch.stack([tensor.more[name] for tensor in tensors]) for name in tensors[0].more}
    stack = QTensor(
        tensors[0].spec,
        torch.stack([tensor.codes for tensor in tensors]),
        torch.stack([tensor.scales for tensor in tensors]),
        more=more,
    )
    both = RelaxedWeight(stack, torch.stack([weight for weight, _ in each]))
    assert torch.allclose(both(), torch.stack([RelaxedWeight(t, w)() for w, t in each]), atol=1e-6)


def test_values_do_not_change_while_the_sweep_goes_on() -> None:
    """Steps that refinement has changed are those that codes are rounded with next."""
    weight, spec = weight_of(), spec_of("q2_k")
    parameters = fit_grid(weight, spec)
    columns = arithmetic_of(spec.grid).columns(parameters, spec.groups, (N, K), range(K))
    _, before = columns.round(weight[:, 7], 7)
    (scales, _), (minima, _) = columns.terms(torch.zeros(256, N, dtype=torch.uint8), 0)  # type: ignore[attr-defined]
    scales.mul_(2)
    minima.mul_(2)
    _, after = columns.round(2 * weight[:, 7], 7)
    assert torch.allclose(after, 2 * before)
