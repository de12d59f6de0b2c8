"""The native search for trellis codes finds the reference's states, bit for bit, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from quantc.kernels.cpu import library
from quantc.kernels.cpu.rounding import NativePanel, panel
from quantc.numerics.basis import Rounding
from quantc.numerics.grids import fit_grid
from quantc.numerics.rounding import round_to_nearest
from quantc.spec import QuantSpec

from .cases import FLOAT_LEVELS, built

pytestmark = built
WIDTHS = (1, 2, 3, 4, 5)
SHAPES = [(64, 3), (96, 2), (65, 1), (130, 2), (7, 2), (32, 1)]


def spec_of(bits: int) -> QuantSpec:
    return QuantSpec(bits, -1, code="trellis")


def random_weight(n: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    weight[n // 2] = 0
    weight[0, 0] *= 100
    weight[:, -1] *= 20  # costs saturate
    return weight


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, int, int], torch.Tensor]:
    found = {}
    for bits in WIDTHS:
        for n, k in SHAPES:
            weight = random_weight(n, k)
            found[bits, n, k] = round_to_nearest(weight, fit_grid(weight, spec_of(bits)), spec_of(bits))
    return found


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_states_are_the_references(level: str, bits: int, expected: dict[tuple[int, int, int], torch.Tensor]) -> None:
    with library.forced(level):
        for n, k in SHAPES:
            weight = random_weight(n, k)
            found = round_to_nearest(weight, fit_grid(weight, spec_of(bits)), spec_of(bits), panel())
            assert torch.equal(found, expected[bits, n, k])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_error_feedback_is_the_references_on_any_number_of_threads(threads: int) -> None:
    """Sums in another order may tip a state over; over columns of one panel there is one order."""
    k, n = 24, 130
    x = torch.randn(200, k, generator=torch.Generator().manual_seed(0))
    gram, weight, before = x.T @ x, random_weight(n, k), torch.get_num_threads()
    tensors = []
    try:
        torch.set_num_threads(threads)
        for way in (None, panel()):
            basis = Rounding(shrink=0.1, panel=way).bases(gram, len(x), [spec_of(3)])[0]
            tensors.append(basis.round(weight, spec_of(3)).codes)
    finally:
        torch.set_num_threads(before)
    assert float((tensors[0] != tensors[1]).float().mean()) < 0.01


def test_panels_of_any_width_and_a_factor_of_any_strides() -> None:
    k, n = 100, 64
    x = torch.randn(400, k, generator=torch.Generator().manual_seed(0))
    basis = Rounding(panel=NativePanel()).bases(x.T @ x, len(x), [spec_of(2)])[0]
    weight = random_weight(n, k)
    first = basis.round(weight, spec_of(2))
    assert basis.factor is not None
    basis.factor.upper = basis.factor.upper.T.contiguous().T
    assert torch.equal(basis.round(weight, spec_of(2)).codes, first.codes)


def test_what_is_no_trellis_is_left_to_torch() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    spec, weight = QuantSpec(3, 8), random_weight(8, 16)
    tensors = [
        Rounding(panel=way).bases(x.T @ x, len(x), [spec])[0].round_each(weight, [spec, spec_of(3)])
        for way in (None, NativePanel())
    ]
    assert torch.equal(tensors[0][0].codes, tensors[1][0].codes)
    assert tensors[0][0].codes.dtype == torch.uint8
    assert tensors[0][1].codes.dtype == torch.int16


def test_empty_weights_and_sizes_that_there_are_not() -> None:
    weight = torch.empty(64, 0)
    assert round_to_nearest(weight, fit_grid(torch.ones(64, 1), spec_of(3)), spec_of(3), panel()).shape == (64, 0)
    with pytest.raises(library.KernelError, match="takes no such sizes"):
        library.loaded().round_trellis(6, 64, 64, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1)
