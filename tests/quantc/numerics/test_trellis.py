"""Trellis codes: their values, the search against a brute-force one, the stored form, and rounding with them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from quantc.formats import format_of
from quantc.numerics.basis import Rounding
from quantc.numerics.grids import arithmetic_of, fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.numerics.statistics import output_energy
from quantc.numerics.trellis import INTEGERS, RMS, encode, pack_states, unpack_states
from quantc.spec import QuantSpec, spec_of_label, tile_of

WIDTHS = (1, 2, 3, 4, 5)


def trellis(bits: int) -> QuantSpec:
    spec = spec_of_label(f"trellis{bits}")
    assert spec is not None
    return spec


def nearest(weight: torch.Tensor, bits: int) -> QTensor:
    spec = trellis(bits)
    parameters = fit_grid(weight, spec)
    return QTensor.of(spec, round_to_nearest(weight, parameters, spec), parameters)


def random_states(n: int, k: int, bits: int) -> torch.Tensor:
    """States (N, K) that closed walks have."""
    tile = tile_of(n)
    packed = torch.randint(0, 256, (-(-n // tile), k, tile * bits // 8), dtype=torch.uint8)
    return unpack_states(packed, bits, n)


def test_values_are_computed_as_the_format_says() -> None:
    words = (np.arange(4096, dtype=np.uint64) * 0x4C5BBDB1) & 0x3F3F3F3F
    values = sum((words >> np.uint64(shift)) & np.uint64(0xFF) for shift in (0, 8, 16, 24)).astype(np.int64) - 126
    assert np.array_equal(INTEGERS.numpy(), values)
    assert abs(float(INTEGERS.float().square().mean().sqrt()) - RMS) < 0.01


def read(packed: np.ndarray, bits: int, tile: int) -> np.ndarray:
    """The reader of docs/format.md: (tiles, K, tile * bits / 8) bytes to integers (tiles, tile, K)."""
    string = np.unpackbits(packed, axis=-1, bitorder="little").astype(np.uint64)
    row = np.arange(tile)
    place = tile // 8 * (row % 8) + row // 8
    at = (bits * place[:, None] + np.arange(12)) % (tile * bits)
    states = (string[..., at] << np.arange(12, dtype=np.uint64)).sum(-1)
    words = states * np.uint64(0x4C5BBDB1) & np.uint64(0x3F3F3F3F)
    integers = sum((words >> np.uint64(shift)) & np.uint64(0xFF) for shift in (0, 8, 16, 24)).astype(np.int64) - 126
    return integers.swapaxes(-1, -2)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(64, 3), (96, 2), (80, 2), (48, 3), (32, 1), (192, 2), (100, 4), (7, 5), (1, 1)])
def test_the_stored_form_is_what_the_page_says(bits: int, shape: tuple[int, int]) -> None:
    n, k = shape
    tensor = nearest(torch.randn(n, k), bits)
    form = format_of(tensor.spec)
    parts = form.pack(tensor)
    layout = form.layout(tensor.spec, shape)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        name: (part.dtype, part.shape) for name, part in layout.items()
    }
    assert sum(8 * part.numel() * part.element_size() for part in parts.values()) == tensor.spec.stored_bits(shape)
    integers = read(parts["qweight"].numpy(), bits, tile_of(n)).reshape(-1, k)[:n]
    assert np.array_equal(integers * parts["scales"].float().numpy(), tensor.dequantize().numpy())
    back = form.unpack(parts, tensor.spec, shape)
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.scales, tensor.scales)


@pytest.mark.parametrize("bits", WIDTHS)
def test_any_bytes_are_a_closed_walk(bits: int) -> None:
    packed = torch.randint(0, 256, (3, 5, 8 * bits), dtype=torch.uint8)
    assert torch.equal(pack_states(unpack_states(packed, bits, 192), bits), packed)
    experts = torch.stack([packed, packed.flip(0)])
    assert torch.equal(pack_states(unpack_states(experts, bits, 192), bits), experts)


def test_tiles_divide_the_outputs_where_they_can() -> None:
    assert [tile_of(n) for n in (64, 576, 1536, 288, 80, 144, 32, 100, 16, 1)] == [
        64,
        64,
        64,
        96,
        80,
        48,
        32,
        64,
        32,
        32,
    ]
    assert trellis(3).bits_per_weight((576, 576)) == pytest.approx(3 + 16 / 576)
    assert trellis(3).bits_per_weight((288, 288)) == pytest.approx(3 + 16 / 288)
    assert trellis(2).bits_per_weight((100, 64)) == pytest.approx(2 * 128 / 100 + 16 / 64)


# Squared errors over the mean square. Shannon's bound is 4^-bits; a uniform grid with zero points in groups of 64 has
# 0.126, 0.0312 and 0.0077 at 2 to 4 bits, and takes 0.28 bits more.
@pytest.mark.parametrize(("bits", "bound"), [(1, 0.32), (2, 0.079), (3, 0.0205), (4, 0.0055), (5, 0.0015)])
def test_normal_weights_lose_what_a_trellis_of_12_bits_loses(bits: int, bound: float) -> None:
    weight = torch.randn(128, 24, generator=torch.Generator().manual_seed(0))
    error = float((nearest(weight, bits).dequantize() - weight).square().mean() / weight.square().mean())
    assert 4.0**-bits < error < bound


def test_no_walk_with_the_same_seam_is_nearer() -> None:
    length = 20  # of 1 bit each, of which the last 11 are the seam
    numbers = torch.randn(8, length, generator=torch.Generator().manual_seed(0))
    states = encode(numbers, 1).long()
    tried = torch.tensor(list(product((0, 1), repeat=length - 11)))
    for row, found in zip(numbers.double(), states, strict=True):
        walks = torch.cat([tried, (found & 1)[-11:].expand(len(tried), 11)], 1)
        others = torch.zeros_like(walks)
        for bit in range(12):  # the last symbol of a state is its lowest bit
            others |= walks.roll(bit, 1) << bit
        lost, least = ((row - INTEGERS[each].double() / RMS).square().sum(-1) for each in (found, others))
        assert float(lost) <= float(least.min()) + 0.05  # costs are rounded to 1 / 441


@pytest.mark.parametrize("size", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("bits", WIDTHS)
def test_closed_walks_are_what_states_are(bits: int, size: float) -> None:
    """Numbers far from all codes too: costs are LARGEST then, also of paths that do not close."""
    numbers = size * torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    states = encode(numbers, bits).int()
    assert torch.equal(states >> bits, states.roll(1, 1) & ((4096 >> bits) - 1))


def test_rows_of_zeros_and_of_outliers() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[5, 7] = 40.0  # a scale of the row's RMS would clip it to 14
    found = nearest(weight, 4).dequantize()
    assert float(found[3].abs().max()) == 0
    assert abs(float(found[5, 7]) - 40) < 12
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_loses_less_than_on_the_uniform_grid_at_fewer_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, n = 32, 64
    x = torch.randn(512, k, generator=generator) @ (torch.randn(k, k, generator=generator) / 8 + torch.eye(k))
    gram, weight = x.T @ x, torch.randn(n, k, generator=generator)
    uniform = QuantSpec(bits, 32)
    lost = {}
    for spec in (trellis(bits), uniform):
        basis = Rounding(shrink=0.15).bases(gram, len(x), [spec])[0]
        tensor = basis.round(weight, spec)
        lost[spec.code] = output_energy(tensor.dequantize() - weight, gram)
        refined = basis.round(weight, spec, rounds=1)
        assert output_energy(refined.dequantize() - weight, gram) < 1.02 * lost[spec.code]
    assert trellis(bits).bits_per_weight((n, k)) < uniform.bits_per_weight((n, k))
    assert lost["trellis"] < 0.85 * lost["uniform"]


def test_codes_of_a_stack_of_experts_are_values_too() -> None:
    states = torch.stack([random_states(64, 3, 2), random_states(64, 3, 2)])
    scales = torch.rand(2, 64, 1).half()
    tensor = QTensor(trellis(2), states, scales)
    assert torch.equal(tensor.dequantize(), INTEGERS[states.long()].float() * scales.float())
    assert arithmetic_of(tensor.spec.grid).grid.label("grow") == "trellis2"
