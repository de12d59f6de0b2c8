"""Groups that stay: as many as asked for, better chosen than by magnitude; what stays is the least-squares solution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantc.formats import format_of
from quantc.numerics.basis import Basis, Rounding
from quantc.numerics.groups import spread_groups
from quantc.numerics.relaxed import RelaxedWeight
from quantc.numerics.sparsity import Spectrum, by_admm, by_magnitude, fit_support
from quantc.spec import QuantSpec

SPARSE = [QuantSpec(4, 16, sparsity=share) for share in (0.5, 0.75)]


def layer(n: int, k: int, rows: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (n, k) and the Gram matrix of correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) + 3 * torch.randn(1, k, generator=generator)
    sizes = torch.rand(k, generator=generator) * 3 + 0.05
    x = torch.randn(rows, k, generator=generator) @ mix * sizes / k**0.5
    return torch.randn(n, k, generator=generator), x.T @ x


def lost(change: torch.Tensor, gram: torch.Tensor) -> float:
    return float((change.double() @ gram.double() * change).sum())


@pytest.mark.parametrize("k", [48, 50, 13])
def test_the_largest_groups_stay(k: int) -> None:
    weight, _ = layer(6, k)
    stays = by_magnitude(weight, QuantSpec(4, 16, sparsity=0.5))
    kept = stays[:, ::16]
    sums = torch.stack([part.square().sum(1) for part in weight.split(16, 1)], 1)
    assert int(kept.sum()) == kept.numel() // 2
    assert torch.equal(stays, kept.repeat_interleave(16, 1)[:, :k])
    assert float(sums[kept].min()) >= float(sums[~kept].max())


@pytest.mark.parametrize("k", [48, 49, 50, 51])
def test_the_two_largest_of_four_stay(k: int) -> None:
    weight, _ = layer(6, k)
    stays = by_magnitude(weight, QuantSpec(4, 16, two_of_four=True))
    for four, marks in zip(weight.abs().split(4, 1), stays.split(4, 1), strict=True):
        assert bool((marks.sum(1) == min(2, four.shape[1])).all())
        assert bool((four.masked_fill(~marks, 9).amin(1) >= four.masked_fill(marks, 0).amax(1)).all())


@pytest.mark.parametrize("spec", [*SPARSE, QuantSpec(4, 16, two_of_four=True)], ids=QuantSpec.label)
def test_admm_loses_less_than_magnitude(spec: QuantSpec) -> None:
    weight, gram = layer(32, 96)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    stays = by_admm(weight, Spectrum.of(gram), spec)
    assert int(stays.sum()) == (32 * 96 // 2 if spec.two_of_four else 16 * spec.kept_groups((32, 96)))
    plain = by_magnitude(weight * gram.diagonal().sqrt(), spec)
    errors = [lost(fit_support(weight, gram, marks) - weight, gram) for marks in (stays, plain)]
    assert errors[0] < 0.95 * errors[1]


def test_all_or_nothing_may_stay() -> None:
    weight, gram = layer(8, 32)
    gram.diagonal().add_(1)
    for sparsity in (0.001, 0.999, 1.0):
        spec = QuantSpec(4, 8, sparsity=sparsity)
        assert int(by_admm(weight, Spectrum.of(gram), spec).sum()) == 8 * spec.kept_groups((8, 32))


def test_what_stays_is_the_least_squares_solution() -> None:
    weight, gram = layer(5, 40)
    gram.diagonal().add_(0.1 * gram.diagonal().mean())
    stays = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    stays[0], stays[1] = False, True
    fitted = fit_support(weight, gram, stays)
    assert not fitted[~stays].any()
    torch.testing.assert_close(fitted[1], weight[1])
    for row in range(2, 5):
        on = stays[row]
        solved = torch.linalg.solve(gram[on][:, on].double(), (gram[on] @ weight[row]).double())
        torch.testing.assert_close(fitted[row, on].double(), solved, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize(("k", "sparsity"), [(96, 0.5), (90, 0.3), (13, 0.5), (96, 1.0)])
def test_rounding_leaves_dropped_groups_at_zero(k: int, sparsity: float, rounds: int, symmetric: bool) -> None:
    weight, gram = layer(24, k)
    spec = QuantSpec(4, 16, symmetric=symmetric, sparsity=sparsity)
    tensor = Basis.of(gram, 512, 0, 0.01, True).round(weight, spec, rounds)
    assert tensor.kept is not None
    assert int(tensor.kept.sum()) == spec.kept_groups((24, k))
    assert bool(torch.isfinite(tensor.scales).all())
    dropped = ~spread_groups(tensor.kept, spec.groups, (24, k))
    assert bool((tensor.codes[dropped] == (spec.mid if symmetric else 0)).all())
    assert not tensor.dequantize()[dropped].any()
    assert bool((tensor.scales[~tensor.kept] == 1).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("k", "rounds"), [(96, 0), (90, 2), (13, 0)])
def test_rounding_keeps_two_of_four(k: int, rounds: int, symmetric: bool) -> None:
    weight, gram = layer(24, k)
    spec = QuantSpec(4, 32, symmetric=symmetric, two_of_four=True)
    tensor = Basis.of(gram, 512, 0, 0.01, True).round(weight, spec, rounds)
    assert tensor.kept is not None
    assert {int(four.sum(1).max()) for four in tensor.kept.split(4, 1)} <= {1, 2}
    assert not tensor.dequantize()[~tensor.kept].any()


@pytest.mark.parametrize("spec", [SPARSE[0], QuantSpec(4, 16, two_of_four=True)], ids=QuantSpec.label)
def test_feedback_and_refit_lose_less_than_rounding_to_nearest(spec: QuantSpec) -> None:
    weight, gram = layer(32, 96)
    guided = Basis.of(gram, 512, 0, 0.01, True).round(weight, spec).dequantize()
    plain = Basis.unguided(gram, 512, 0).round(weight, spec).dequantize()
    refined = Basis.of(gram, 512, 0, 0.01, True).round(weight, spec, 2).dequantize()
    assert lost(guided - weight, gram) < 0.6 * lost(plain - weight, gram)
    assert lost(refined - weight, gram) <= lost(guided - weight, gram)


def test_inputs_that_were_always_zero_go_first() -> None:
    weight, gram = layer(8, 64)
    gram[:32], gram[:, :32] = 0, 0
    tensor = Basis.of(gram, 512, 0, 0.01, True).round(weight, QuantSpec(4, 16, sparsity=0.5))
    assert tensor.kept is not None
    assert tensor.kept.tolist() == [[False, False, True, True]] * 8
    nothing = Basis.of(torch.zeros(64, 64), 512, 0, 0.01, True).round(weight, QuantSpec(4, 16, sparsity=0.5))
    assert bool(torch.isfinite(nothing.dequantize()).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"two_of_four": True}], ids=str)
def test_training_leaves_what_is_dropped_at_zero(pattern: dict[str, Any], symmetric: bool) -> None:
    weight, gram = layer(8, 60)
    spec = QuantSpec(4, 16, symmetric=symmetric, **pattern)
    tensor = Basis.of(gram, 512, 0, 0.01, True).round(weight, spec)
    relaxed = RelaxedWeight(tensor, weight)
    torch.testing.assert_close(relaxed(), tensor.dequantize())
    with torch.no_grad():
        relaxed.offsets.fill_(1.0)
    found, stays = relaxed.qtensor(), tensor.stays()
    assert stays is not None
    assert not found.dequantize()[~stays].any()
    assert not torch.equal(found.codes, tensor.codes)
    again = format_of(spec).unpack(format_of(spec).pack(found), spec, (8, 60))
    assert torch.equal(again.dequantize(), found.dequantize())


def test_dense_and_sparse_specs_share_a_basis() -> None:
    weight, gram = layer(8, 64)
    basis = Rounding(shrink=0.15).bases(gram, 512, [QuantSpec(3, 16), QuantSpec(4, 16, sparsity=0.5)])[0]
    specs = [QuantSpec(3, 16), QuantSpec(4, 16, sparsity=0.5), QuantSpec(2, 32)]
    found = basis.round_each(weight, specs)
    assert [tensor.spec for tensor in found] == specs
    for tensor, spec in zip(found, specs, strict=True):
        assert torch.equal(tensor.dequantize(), basis.round(weight, spec).dequantize())
