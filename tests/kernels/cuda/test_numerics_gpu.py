"""The rotation, the sweep and the Gram matrix where there is a GPU: against torch on that GPU."""

from __future__ import annotations

import pytest
import torch

from quantc.kernels.cuda import gram, hadamard
from quantc.kernels.cuda.device import architecture, unavailable
from quantc.kernels.cuda.gptq import panel_for
from quantc.kernels.cuda.trellis_launch import WIDTHS
from quantc.numerics.grids import TrellisColumns, fit_grid
from quantc.numerics.hadamard import block_order, rotate
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import factorize, gptq
from quantc.spec import WHOLE_ROW, QuantSpec

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def device() -> torch.device:
    reason = unavailable()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


def arch_of(device: torch.device) -> int:
    assert device.index is not None
    return int(architecture(device.index).removeprefix("sm_"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12, 96, 576, 1536, 2048, 4096, 11008, 14336, 18944, 24576, 28672, 29568])
@pytest.mark.parametrize("rows", [1, 17, 1000])
def test_rows_are_rotated(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    block = block_order(width)
    if reason := hadamard.supports(width, block, dtype, arch_of(device)):
        pytest.skip(reason)
    x = torch.randn(rows, width, device=device).to(dtype)
    exact = rotate(x.double(), block)
    size = x.double().norm(dim=-1, keepdim=True)
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2048 * 2**-24 * size
    assert ((hadamard.rotate(x, block).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (33, 576), (5000, 1536), (4096, 4096), (129, 11008)])
def test_products_are_added(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    if reason := gram.supports(width, dtype, arch_of(device)):
        pytest.skip(reason)
    x = torch.randn(rows, width, device=device).to(dtype)
    h, again = torch.zeros(2, width, width, device=device)
    gram.add_gram(x, h)
    gram.add_gram(x, again)
    assert torch.equal(h, again)
    size = x.double().abs().T @ x.double().abs()
    # The sums that tensor cores carry on are cut, at most once for every 8 rows of a launch.
    cuts = min(rows, gram.MOST_ROWS) / 8 + 4
    assert ((h.double() - x.double().T @ x.double()).triu().abs() <= cuts * 2**-23 * size).all()


@pytest.mark.parametrize(("n", "k"), [(100, 130), (1024, 2048)])
@pytest.mark.parametrize("spec", [QuantSpec(4, 128), QuantSpec(3, 32, "per_ic")], ids=str)
def test_sweeps_give_the_codes_of_torch(n: int, k: int, spec: QuantSpec, device: torch.device) -> None:
    x = torch.randn(2 * k, k, device=device) + torch.randn(2 * k, 1, device=device)
    weight = torch.randn(n, k, device=device)
    factor, grid = factorize(x.T @ x), fit_grid(weight, spec)
    panel = panel_for(device)
    assert panel is not None
    codes = gptq(weight, factor, grid, spec, panel)
    # A value within a rounding of a tie may go either way, and takes later columns of its channel along.
    same = (codes == gptq(weight, factor, grid, spec)).all(1).float().mean()
    assert same > 0.95


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [64, 100, 288])
def test_states_are_those_of_the_reference(bits: int, n: int, device: torch.device) -> None:
    values = torch.randn(6, n, generator=torch.Generator().manual_seed(0))
    scales = torch.full((1, n), 1 / 37)
    panel = panel_for(device)
    assert panel is not None
    columns = TrellisColumns(scales.to(device), [0] * 6, bits)
    assert panel.takes(columns)
    expected = TrellisColumns(scales, [0] * 6, bits).nearest(values)
    assert torch.equal(panel.nearest(columns, values.to(device)).cpu(), expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_sweeps_in_trellis_codes(bits: int, device: torch.device) -> None:
    spec = QuantSpec(bits, WHOLE_ROW, code="trellis")
    x = torch.randn(96, 40) + torch.randn(96, 1)
    weight = torch.randn(128, 40)
    factor, grid = factorize(x.T @ x), fit_grid(weight, spec)
    expected = gptq(weight, factor, grid, spec)
    factor.upper, factor.order = factor.upper.to(device), factor.order.to(device)
    codes = gptq(weight.to(device), factor, fit_grid(weight.to(device), spec), spec, panel_for(device)).cpu()
    # Errors are fed on in one rounding rather than two; a tile where that moves a state goes other ways from there.
    same = (codes == expected).float().mean()
    assert same > 0.5
    lost = [(QTensor.of(spec, found, grid).dequantize() - weight) @ x.T for found in (codes, expected)]
    assert float(lost[0].square().sum()) < 1.03 * float(lost[1].square().sum())
