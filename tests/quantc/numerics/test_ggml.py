"""GGUF's block types as grids: what is stored is what llama.cpp reads, and rounding on them is as on any grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantc.errors import UsageError
from quantc.export.gguf.blocks import TYPES
from quantc.export.gguf.convert import to_blocks
from quantc.formats import DENSE
from quantc.numerics.basis import Basis
from quantc.numerics.grids import arithmetic_of, fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.planning.targets import spec_of_code
from quantc.spec import GRIDS, Ggml, QuantSpec

gguf = pytest.importorskip("gguf")
libgguf = pytest.importorskip("libgguf")

NAMES = sorted(name for name, grid in GRIDS.items() if issubclass(grid, Ggml))
N, K = 24, 512


def spec_of(name: str) -> QuantSpec:
    grid = GRIDS[name]
    assert issubclass(grid, Ggml)
    return QuantSpec(grid.width, grid.block, code=name)


def weight_and_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with outliers, a column and a block of zeros, and correlated rows that it multiplies."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * 0.05
    weight[:, ::97] *= 8
    weight[:, 5] = 0
    weight[3, 256:] = 0
    weight[4, :32] = 0.3 + 0.01 * torch.randn(32, generator=generator)
    mixing = torch.randn(48, K, generator=generator)
    return weight, torch.randn(2048, 48, generator=generator) @ mixing + torch.randn(2048, K, generator=generator)


def error(found: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    difference = found - weight
    return float((difference @ gram * difference).sum() / (weight @ gram * weight).sum())


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_for_what_the_independent_decoder_reads(name: str) -> None:
    weight, _ = weight_and_rows()
    spec = spec_of(name)
    arithmetic = arithmetic_of(spec.grid)
    parameters = fit_grid(weight, spec)
    tensor = QTensor.of(spec, arithmetic.nearest(weight, parameters, spec.groups), parameters)
    kind = TYPES[name.upper()]
    packed = kind.pack(to_blocks(tensor))
    assert packed.numel() * 8 == spec.stored_bits((N, K)) == kind.row_bytes(K) * 8 * N
    read = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType(kind.number))
    assert torch.equal(torch.from_numpy(np.array(read)), tensor.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_the_native_format_stores_the_same_numbers_in_as_many_bits(name: str) -> None:
    weight, _ = weight_and_rows()
    spec = spec_of(name)
    parameters = fit_grid(weight, spec)
    tensor = QTensor.of(spec, arithmetic_of(spec.grid).nearest(weight, parameters, spec.groups), parameters)
    parts = DENSE.pack(tensor)
    layout = DENSE.layout(spec, (N, K))
    assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == {
        key: (part.dtype, part.shape) for key, part in layout.items()
    }
    assert 8 * sum(part.nbytes for part in parts.values()) == spec.stored_bits((N, K))
    back = DENSE.unpack(parts, spec, (N, K))
    assert torch.equal(back.codes, tensor.codes)
    assert torch.equal(back.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_its_search_is_as_good_as_llama_cpps_and_error_feedback_is_better(name: str) -> None:
    weight, rows = weight_and_rows()
    gram, spec = rows.T @ rows, spec_of(name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    theirs = libgguf.quantize_rows(weight.numpy(), int(kind), imatrix=gram.diagonal().numpy())
    read = gguf.quants.dequantize(np.asarray(theirs).view(np.uint8).reshape(N, -1), kind)
    reference = error(torch.from_numpy(np.array(read)), weight, gram)
    basis = Basis.of(gram, len(rows), 0, 0.01, True)
    unguided = arithmetic_of(spec.grid)
    parameters = fit_grid(weight, spec, gram.diagonal())
    nearest = unguided.value(unguided.nearest(weight, parameters, spec.groups), parameters, spec.groups)
    swept, refined = (error(basis.round(weight, spec, rounds).dequantize(), weight, gram) for rounds in (0, 2))
    assert error(nearest, weight, gram) < 1.1 * reference
    assert swept < 0.6 * reference
    assert refined < swept


@pytest.mark.parametrize("name", NAMES)
def test_experts_and_empty_weights(name: str) -> None:
    weight, _ = weight_and_rows()
    spec = spec_of(name)
    arithmetic = arithmetic_of(spec.grid)
    for stack in (torch.zeros(2, N, K), torch.stack([weight, -weight])):
        fitted = [fit_grid(each, spec) for each in stack]
        parameters = type(fitted[0]).merged(fitted, torch.stack)
        codes = torch.stack([arithmetic.nearest(w, p, spec.groups) for w, p in zip(stack, fitted, strict=True)])
        values = QTensor.of(spec, codes, parameters).dequantize()
        assert torch.isfinite(values).all()
        assert bool((values == 0).all()) == bool((stack == 0).all())


def test_what_a_spec_cannot_say() -> None:
    with pytest.raises(UsageError, match="bits is 3, but codes of q4_k have 4 bits; write that"):
        QuantSpec(3, 256, code="q4_k")
    with pytest.raises(UsageError, match="group_size is 64 per_oc, but blocks of q4_k have 256 weights"):
        QuantSpec(4, 64, code="q4_k")
    with pytest.raises(UsageError, match="no weight of q4_k can be dropped; leave two_of_four out"):
        QuantSpec(4, 256, code="q4_k", two_of_four=True)
    assert QuantSpec(4, 256, code="q4_k").label() == "q4_k"
    assert QuantSpec.from_dict(spec_of("q2_k").to_dict()) == spec_of("q2_k")


def test_scales_are_above_zero_where_every_level_has_its_opposite() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert bool((fit_grid(weight, spec_of_code("q8_0")).scales > 0).all())
    assert bool((fit_grid(weight, spec_of_code("q4_0")).scales < 0).any())
