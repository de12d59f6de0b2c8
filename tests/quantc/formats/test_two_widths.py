"""Rows of two widths: exact parts for any share of wide rows, and the product of the dense weight."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from quantc.errors import CheckpointError
from quantc.formats import DENSE, TWO_WIDTHS, Parts, format_of
from quantc.kernels.cpu import library
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose
from quantc.kernels.two_widths import TwoWidths
from quantc.numerics.qtensor import QTensor
from quantc.numerics.row_widths import mark_salient, read_rows, split, write_rows
from quantc.spec import WHOLE_ROW, QuantSpec

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 13), (33, 64), (16, 70)]
LEADING = [(), (3,), (2, 2)]


def random_qtensor(spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = (), seed: int = 0) -> QTensor:
    """With codes and zeros that use the width of their row, and other wide rows for every leading index."""
    generator = torch.Generator().manual_seed(seed)
    salience = torch.rand(*leading, shape[0], generator=generator).reshape(-1, shape[0])
    wide = torch.stack([mark_salient(one, spec.wide_rows) for one in salience]).reshape(*leading, shape[0])
    levels = (spec.levels << wide.int())[..., None]

    def codes(columns: int) -> torch.Tensor:
        return (torch.rand(*leading, shape[0], columns, generator=generator) * levels).to(torch.uint8)

    def numbers(*size: int) -> torch.Tensor:
        return torch.randn(*leading, *size, generator=generator).half()

    groups = spec.scales_shape(shape)
    return QTensor(
        spec,
        codes(shape[1]),
        numbers(*groups),
        None if spec.symmetric else codes(groups[1]),
        numbers(spec.rank, shape[1]) if spec.rank else None,
        numbers(shape[0], spec.rank) if spec.rank else None,
        wide,
    )


def specs(rows: int) -> list[QuantSpec]:
    """From none to all of the rows wide."""
    return [
        QuantSpec(bits, group, symmetric=symmetric, rank=rank, wide_rows=wide)
        for bits, group, rank in ((2, 8, 0), (3, WHOLE_ROW, 2), (5, 5, 0), (7, 64, 1))
        for symmetric in (False, True)
        for wide in sorted({0, 1, rows // 2, rows - 1, rows})
    ]


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_follows_the_layout_and_unpacks_exactly(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    for spec in specs(shape[0]):
        tensor = random_qtensor(spec, shape, leading)
        parts = TWO_WIDTHS.pack(tensor)
        layout = TWO_WIDTHS.layout(spec, shape, leading)
        assert list(parts) == list(layout)
        assert all((parts[name].dtype, parts[name].shape) == (part.dtype, part.shape) for name, part in layout.items())
        again = TWO_WIDTHS.unpack(parts, spec, shape)
        for field in ("codes", "scales", "zeros", "low_rank_a", "low_rank_b", "wide"):
            before, after = getattr(tensor, field), getattr(again, field)
            assert (before is None and after is None) or torch.equal(before, after), (spec, field)
        assert torch.equal(again.effective_weight(), tensor.effective_weight())


@pytest.mark.parametrize("shape", SHAPES)
def test_stored_bits_are_the_bytes_of_the_packed_parts(shape: tuple[int, int]) -> None:
    for spec in specs(shape[0]):
        if spec.wide_rows:
            stored = sum(part.nbytes for part in TWO_WIDTHS.pack(random_qtensor(spec, shape)).values())
            assert spec.stored_bits(shape) == 8 * stored
            assert spec.bits_per_weight(shape) == 8 * stored / (shape[0] * shape[1])


def test_the_bits_of_a_usual_share() -> None:
    narrow, wide = QuantSpec(3, 64), QuantSpec(4, 64)
    mixed = QuantSpec(3, 64, wide_rows=128)
    average = (narrow.bits_per_weight((512, 512)) * 3 + wide.bits_per_weight((512, 512))) / 4
    assert mixed.bits_per_weight((512, 512)) == average + 1 / 512


def test_a_row_is_what_the_dense_format_makes_of_it() -> None:
    for spec in specs(33):
        tensor = random_qtensor(spec, (33, 64))
        assert tensor.wide is not None
        narrow, wide = split(tensor)
        weight = torch.empty(33, 64)
        weight[~tensor.wide], weight[tensor.wide] = narrow.dequantize(), wide.dequantize()
        assert torch.equal(tensor.dequantize(), weight)
        assert torch.equal(DENSE.unpack(DENSE.pack(wide), wide.spec, wide.shape).dequantize(), wide.dequantize())


def test_the_format_follows_from_the_spec() -> None:
    assert format_of(QuantSpec(3, 64)) is DENSE
    assert format_of(QuantSpec(3, 64, wide_rows=1)) is TWO_WIDTHS


def test_an_index_that_contradicts_the_spec_is_refused() -> None:
    spec = QuantSpec(3, 8, wide_rows=5)
    parts = TWO_WIDTHS.pack(random_qtensor(spec, (16, 24)))
    parts["wide"][0] ^= 1
    with pytest.raises(CheckpointError, match=r"the index of a weight \(16, 24\) marks [46] rows .* its spec says 5"):
        TWO_WIDTHS.unpack(parts, spec, (16, 24))


def test_marks_are_written_a_digit_for_four_rows() -> None:
    rows = torch.tensor([True, False, False, True, False, False, False, False, False, True])
    assert write_rows(rows) == "0902"
    assert read_rows("0902").tolist() == [*rows.tolist(), *([False] * 6)]


def test_equal_salience_marks_the_first_rows() -> None:
    assert mark_salient(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [True, True, True, False]


def product_of(x: torch.Tensor, tensor: QTensor, parts: Parts) -> tuple[torch.Tensor, str]:
    kernel = choose(tensor.spec, tensor.shape, x.device, x.dtype).kernel
    assert kernel.supports(tensor.spec, tensor.shape, x.device, x.dtype) is None
    return kernel.run(x, kernel.prepare(parts, tensor.spec, tensor.shape, x.dtype)), kernel.name


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_those_of_the_dense_weight(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(library, "load", lambda: "was not built")
    for (n, k), hadamard, symmetric in product([(33, 64), (48, 128)], (0, 32), (False, True)):
        spec = QuantSpec(3, 32, symmetric=symmetric, rank=2, hadamard=hadamard, wide_rows=16)
        tensor = random_qtensor(spec, (n, k))
        tensor.scales.mul_(0.1)
        weight = tensor.effective_weight().double()
        for rows in ((1,), (2, 3), (17,), (0,)):
            x = torch.randn(*rows, k, generator=torch.Generator().manual_seed(1)).to(dtype)
            y, _ = product_of(x, tensor, TWO_WIDTHS.pack(tensor))
            expected = x.double() @ weight.T
            size = x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=1)
            assert y.shape == expected.shape
            assert bool(((y.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * size).all())


def test_each_width_runs_on_its_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "was not built")
    spec, shape = QuantSpec(3, 32, wide_rows=16), (48, 128)
    choice = choose(spec, shape, CPU, torch.bfloat16)
    assert isinstance(choice.kernel, TwoWidths)
    assert choice.kernel.name == "reference + torch-int4"
    assert choice.refused["torch-int4"] == "needs 4 bits, not 3"
    assert choose(spec, shape, CPU, torch.float32).kernel.name == "reference"


def test_a_bias_is_added_and_gradients_reach_the_input() -> None:
    spec = QuantSpec(3, 32, wide_rows=5)
    tensor = random_qtensor(spec, (17, 64))
    bias = torch.randn(17, generator=torch.Generator().manual_seed(2))
    kernel = choose(spec, (17, 64), CPU, torch.float32).kernel
    prepared = kernel.prepare(TWO_WIDTHS.pack(tensor), spec, (17, 64), torch.float32)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = kernel.run(x, prepared, bias)
    torch.testing.assert_close(y, x @ tensor.dequantize().T + bias, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, tensor.dequantize().sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)


def test_the_reference_reads_both_formats() -> None:
    spec, shape = QuantSpec(3, 8, wide_rows=5), (17, 64)
    tensor = random_qtensor(spec, shape)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    y = REFERENCE.run(x, REFERENCE.prepare(TWO_WIDTHS.pack(tensor), spec, shape, torch.float32))
    torch.testing.assert_close(y, x @ tensor.dequantize().T, rtol=1e-4, atol=1e-4)
