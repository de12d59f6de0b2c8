"""Low-rank compensation against the SVD of E S, and what float16 does to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from quantc.numerics import lowrank
from quantc.numerics.grids import fit_grid
from quantc.numerics.lowrank import FEWEST_BLOCKS, OVERSAMPLE, GramRoot, compensate
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import factorize, gptq
from quantc.spec import QuantSpec

SMALL = [(1, 7), (7, 1), (12, 20), (20, 12), (16, 16)]  # all eigenvectors are computed
LARGE = [(96, 150), (150, 96), (110, 110)]  # ranks 1 to 3 are searched for
CLOSE = 1e-3  # what the search may leave beyond the least error, as a share of it
ROUNDED = 1e-5  # float16 factors have relative errors of 2^-12; in energy that is 6e-8 of each component


def random_residual(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.01


def gram_of(k: int, rows: int = 400, seed: int = 1) -> torch.Tensor:
    """(K, K) float32 of correlated rows: few directions carry most of the energy, and one channel is far larger."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    x = (torch.randn(rows, k, generator=generator) * torch.logspace(0, -1.5, k)) @ mix
    x[:, k // 2] *= 20
    return x.T @ x


def energy(residual: torch.Tensor, gram: torch.Tensor | None) -> float:
    """tr(E G E^T) in float64."""
    wide = residual.double()
    return float(((wide if gram is None else wide @ gram.double()) * wide).sum())


def left_over(
    residual: torch.Tensor, gram: torch.Tensor | None, factors: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    a, b = factors
    return residual.double() - b.double() @ a.double()


def error(residual: torch.Tensor, gram: torch.Tensor | None, rank: int, damp: float = 0.0) -> float:
    return energy(left_over(residual, gram, compensate(residual, gram, rank, damp)), gram)


def least_error(residual: torch.Tensor, gram: torch.Tensor | None, rank: int) -> float:
    """What the truncated SVD of E S leaves, with S the symmetric root of G."""
    seen = residual.double()
    if gram is not None:
        values, vectors = torch.linalg.eigh(gram.double())
        seen = seen @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return float(torch.linalg.svdvals(seen)[rank:].square().sum())


def is_searched(shape: tuple[int, int], rank: int) -> bool:
    return FEWEST_BLOCKS * (rank + OVERSAMPLE) < min(shape)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("shape", SMALL)
def test_the_error_is_that_of_the_truncated_svd(shape: tuple[int, int], seen: bool) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1]) if seen else None
    for rank in range(min(shape) + 1):
        assert not is_searched(shape, rank)
        least = least_error(residual, gram, rank)
        assert error(residual, gram, rank) == pytest.approx(least, rel=ROUNDED, abs=ROUNDED * energy(residual, gram))


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", LARGE)
def test_the_search_comes_as_close_as_it_claims(shape: tuple[int, int], rank: int, seen: bool) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1]) if seen else None
    assert is_searched(shape, rank)
    least = least_error(residual, gram, rank)
    assert least * (1 - ROUNDED) <= error(residual, gram, rank) <= least * (1 + CLOSE)


@pytest.mark.parametrize("shape", LARGE)
def test_a_steep_spectrum_is_searched_to_its_small_end(shape: tuple[int, int]) -> None:
    n, k = shape
    left, right = torch.linalg.qr(random_residual(n, 6))[0], torch.linalg.qr(random_residual(k, 6))[0]
    residual = (left * 10.0 ** -torch.arange(6)) @ right.T
    for rank in (1, 2, 3):
        # float16 leaves 1e-7 to 2e-7 of the first component's energy; the third has 1e-4 of it.
        assert error(residual, None, rank) <= least_error(residual, None, rank) * (1 + CLOSE) + 3e-7


@pytest.mark.parametrize("shape", LARGE)
def test_a_residual_of_low_rank_disappears(shape: tuple[int, int]) -> None:
    residual = random_residual(shape[0], 2) @ random_residual(2, shape[1])
    gram = gram_of(shape[1])
    for rank in (2, 3):
        assert is_searched(shape, rank)
        assert error(residual, gram, rank) < ROUNDED * energy(residual, gram)


@pytest.mark.parametrize("shape", [(100, 100), (100, 180), (180, 100)])
def test_the_search_ends_when_the_space_is_full(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "GROWTH", -1.0)  # never content
    residual, gram = random_residual(*shape), gram_of(shape[1])
    for rank in (1, 3):  # blocks of 9 and 11, which 100 is no multiple of
        assert is_searched(shape, rank)
        assert error(residual, gram, rank) == pytest.approx(least_error(residual, gram, rank), rel=ROUNDED)


def test_the_search_ends_early_where_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, orthonormal = [], lowrank._orthonormal

    def counting(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        blocks.append(len(rows))
        return orthonormal(rows, basis)

    monkeypatch.setattr(lowrank, "_orthonormal", counting)
    compensate(random_residual(300, 2) @ random_residual(2, 300), gram_of(300), 2)
    assert len(blocks) <= 2


@pytest.mark.parametrize("shape", LARGE)
def test_bands_make_no_difference(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1])
    whole = error(residual, gram, 3)
    for weights in (1, 1000):
        monkeypatch.setattr(lowrank, "BAND_WEIGHTS", weights)
        assert error(residual, gram, 3) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), *LARGE])
def test_components_come_in_falling_order(shape: tuple[int, int]) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1])
    a, b = compensate(residual, gram, 3)
    sizes = [energy(b[:, [i]].double() @ a[[i]].double(), gram) for i in range(3)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), *LARGE])
def test_components_that_are_exactly_zero_spoil_no_others(shape: tuple[int, int]) -> None:
    residual = torch.zeros(shape)
    residual[1, 2] = 0.5
    for rank in (1, 3):
        assert error(residual, None, rank) < ROUNDED * energy(residual, None)


@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_more_rank_never_leaves_more(shape: tuple[int, int]) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1])
    found = [error(residual, gram, rank) for rank in range(min(*shape, 12) + 1)]
    assert found[0] == energy(residual, gram)
    # The search may stop a little earlier at one rank than at another.
    assert all(after <= before * (1 + CLOSE) for before, after in pairwise(found))
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_full_rank_leaves_nothing(shape: tuple[int, int], seen: bool) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1]) if seen else None
    assert error(residual, gram, min(shape)) < ROUNDED * energy(residual, gram)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (96, 150), (150, 96)])
def test_a_singular_gram_is_served_as_well(shape: tuple[int, int]) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1], rows=5)
    gram[3] = 0
    gram[:, 3] = 0
    for rank in (1, 3):
        least = least_error(residual, gram, rank)
        assert error(residual, gram, rank) <= least * (1 + CLOSE)
    assert error(residual, gram, 5) < ROUNDED * energy(residual, gram)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (96, 150), (150, 96)])
@pytest.mark.parametrize("rows", [3, 400])
def test_no_input_is_served_worse_even_if_calibration_never_saw_it(shape: tuple[int, int], rows: int) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1], rows)
    after = left_over(residual, gram, compensate(residual, gram, 3))
    inputs = torch.cat([random_residual(shape[1], 200, seed=7).double(), torch.eye(shape[1], dtype=torch.float64)], 1)
    assert bool(((after @ inputs).norm(dim=0) <= (residual.double() @ inputs).norm(dim=0) * (1 + 1e-3)).all())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (96, 150)])
def test_nothing_seen_or_nothing_lost_gives_zeros(shape: tuple[int, int]) -> None:
    n, k = shape
    for residual, gram in (
        (random_residual(n, k), torch.zeros(k, k)),
        (torch.zeros(n, k), gram_of(k)),
        (torch.zeros(n, k), None),
    ):
        a, b = compensate(residual, gram, 2)
        assert not bool(a.any())
        assert not bool(b.any())


@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_no_gram_is_the_identity(shape: tuple[int, int]) -> None:
    residual = random_residual(*shape)
    assert error(residual, None, 1) == pytest.approx(error(residual, torch.eye(shape[1]), 1), rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (96, 150), (150, 96)])
def test_damping_chooses_directions_for_the_damped_gram(shape: tuple[int, int]) -> None:
    residual, gram, damp = random_residual(*shape), gram_of(shape[1], rows=20), 0.5
    damped = gram + damp * gram.diagonal().mean() * torch.eye(shape[1])
    factors = compensate(residual, gram, 3, damp)
    assert energy(left_over(residual, gram, factors), damped) <= least_error(residual, damped, 3) * (1 + CLOSE)
    assert energy(left_over(residual, gram, factors), gram) < energy(residual, gram)


def test_damping_leaves_inputs_that_were_always_zero_out_of_the_mean() -> None:
    assert GramRoot(torch.diag(torch.tensor([0.0, 2.0, 4.0, 0.0]))).mean == 3.0
    assert GramRoot(torch.zeros(4, 4)).mean == 0.0


@pytest.mark.parametrize("added", [0.0, 0.3])
def test_the_root_is_a_root(added: float) -> None:
    gram = gram_of(20, rows=5)
    root = GramRoot(gram).root(added)
    expected = gram.double() + added * torch.eye(20)
    torch.testing.assert_close(root @ root.T, expected, rtol=0, atol=1e-6 * float(gram.abs().max()))


def test_negative_eigenvalues_count_as_zero() -> None:
    root = GramRoot(torch.diag(torch.tensor([4.0, -1e-3, 1.0]))).root()
    torch.testing.assert_close(root @ root.T, torch.diag(torch.tensor([4.0, 0, 1], dtype=torch.float64)))


def test_weights_share_a_root(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = gram_of(12)
    root, decomposed, eigh = GramRoot(gram), [], torch.linalg.eigh

    def counting(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decomposed.append(torch.equal(matrix, gram.double()))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counting)
    compensate(random_residual(9, 12), root, 3)
    assert sum(decomposed) == 0  # only a weight with more outputs than inputs needs it
    for seed in (1, 2, 3):
        shared = compensate(random_residual(30, 12, seed), root, 3)
    assert sum(decomposed) == 1
    alone = compensate(random_residual(30, 12, 3), gram, 3)
    assert all(torch.equal(*pair) for pair in zip(shared, alone, strict=True))


@pytest.mark.parametrize("shape", [(12, 20), (96, 150)])
@pytest.mark.parametrize("exponent", [-40, -20, -12, -9, -7, -6, -5, -3, 0, 3, 6, 9, 12, 14, 20, 38])
def test_residuals_of_any_size_give_finite_factors_that_do_no_harm(shape: tuple[int, int], exponent: int) -> None:
    residual = (random_residual(*shape).double() * 10.0**exponent).float().clamp(-3e38, 3e38)
    gram = gram_of(shape[1])
    a, b = compensate(residual, gram, 3)
    assert bool(torch.isfinite(a).all() & torch.isfinite(b).all())
    before, after = energy(residual, gram), energy(left_over(residual, gram, (a, b)), gram)
    assert after <= before
    if -4 < exponent < 9:
        assert after <= least_error(residual, gram, 3) * (1 + CLOSE)
    if exponent <= -20:
        assert not bool(a.any() | b.any())
    if exponent >= 9:
        assert bool(a.any())
    if 9 <= exponent <= 12:  # b a reaches 4e9: a part is taken away
        assert after < before


def test_a_component_that_only_does_harm_is_dropped() -> None:
    # Factors of a few steps of 2^-24, the least float16: rounding can double a component that then does harm.
    for scale in torch.logspace(-16, -11, 60).tolist():
        residual = torch.ones(4, 4) * scale + random_residual(4, 4) * scale
        assert error(residual, None, 2) <= energy(residual, None)


def test_large_components_do_not_hide_small_ones() -> None:
    residual = torch.zeros(8, 8)
    residual[0, 0], residual[1, 1], residual[2, 2] = 3e3, 1.0, 1e-3
    a, b = compensate(residual, None, 3)
    torch.testing.assert_close((b.double() @ a.double()).diagonal(), residual.diagonal().double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_both_factors_share_the_size_of_a_component(shape: tuple[int, int]) -> None:
    residual = random_residual(*shape)
    a, b = compensate(residual, gram_of(shape[1]), min(*shape, 3))
    torch.testing.assert_close(a.abs().amax(1), b.abs().amax(0), rtol=2**-9, atol=0)


@pytest.mark.parametrize("shape", [*SMALL, *LARGE])
def test_shapes_and_types(shape: tuple[int, int]) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1])
    copies = residual.clone(), gram.clone()
    for rank in (0, 1):
        a, b = compensate(residual, gram, rank)
        assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert (a.dtype, b.dtype) == (torch.float16, torch.float16)
        assert a.is_contiguous()
        assert b.is_contiguous()
    assert torch.equal(residual, copies[0])
    assert torch.equal(gram, copies[1])


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (96, 150)])
def test_the_result_hangs_on_no_seed_and_moves_none(shape: tuple[int, int]) -> None:
    residual, gram = random_residual(*shape), gram_of(shape[1])
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        results.append(compensate(residual, gram, 3))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(20, 12), (96, 150)])
def test_a_transposed_view_is_read_as_any_other_residual(shape: tuple[int, int]) -> None:
    view, gram = random_residual(*shape).T, gram_of(shape[0])
    assert error(view, gram, 2) == pytest.approx(error(view.contiguous(), gram, 2), rel=1e-6)


@pytest.mark.parametrize("shape", [(16, 32), (48, 32)])
def test_it_is_added_to_the_rounded_weight(shape: tuple[int, int]) -> None:
    spec, gram = QuantSpec(3, 16, rank=4), gram_of(shape[1])
    weight = random_residual(*shape)
    grid = fit_grid(weight, spec, gram.diagonal())
    rounded = QTensor(spec, gptq(weight, factorize(gram), grid, spec), grid.scales, grid.zeros)
    before = weight - rounded.effective_weight()
    rounded.low_rank_a, rounded.low_rank_b = compensate(before, gram, spec.rank)
    assert energy(weight - rounded.effective_weight(), gram) < 0.75 * energy(before, gram)


@pytest.mark.parametrize("rank", [-1, 5, 100])
@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_rank_that_the_weight_does_not_have_is_refused(shape: tuple[int, int], rank: int) -> None:
    with pytest.raises(ValueError, match=f"has ranks 0 to 4, not {rank}"):
        compensate(random_residual(*shape), None, rank)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_an_arithmetic_error(bad: float) -> None:
    residual, gram = random_residual(6, 8), gram_of(8)
    residual[2, 3] = bad
    with pytest.raises(ArithmeticError, match="residual of a weight of 6 x 8 is not finite"):
        compensate(residual, gram, 2)
    gram[1, 4] = bad
    with pytest.raises(ArithmeticError, match="Gram matrix of 8 inputs is not finite"):
        compensate(random_residual(6, 8), gram, 2)
