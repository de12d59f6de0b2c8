"""Weights with dropped groups on a real GPU: every path against float64, in CUDA graphs, and compiled by torch."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import GROUP_SPARSE
from quantc.kernels.cuda.kept import CUDA_KEPT
from quantc.kernels.cuda.kept_layout import KeptWeight
from quantc.kernels.cuda.layout import CODE_BITS
from quantc.kernels.registry import choose
from quantc.numerics.qtensor import QTensor
from quantc.spec import SPARSE_GROUPS, QuantSpec
from tests.kernels.cuda.kept_weights import random_kept

pytestmark = pytest.mark.gpu

SHAPES = ((1000, 1608), (64, 8), (1, 520))
TOKENS = (1, 2, 3, 8, 9, 16, 24, 25, 200)


def prepared(tensor: QTensor, dtype: torch.dtype = torch.float16) -> KeptWeight:
    parts = {name: part.cuda() for name, part in GROUP_SPARSE.pack(tensor).items()}
    assert choose(tensor.spec, tensor.shape, torch.device("cuda"), dtype).kernel is CUDA_KEPT
    return CUDA_KEPT.prepare(parts, tensor.spec, tensor.shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_products_of_every_kind(bits: int, dtype: torch.dtype) -> None:
    for group, shape, rank in ((g, s, r) for g in SPARSE_GROUPS for s in SHAPES for r in (0, 2)):
        spec = QuantSpec(bits, group, symmetric=rank == 0 and bits == 4, rank=rank, sparsity=0.5)
        tensor = random_kept(spec, shape, uneven=rank == 2)
        weight = prepared(tensor, dtype)
        matrix = tensor.effective_weight().double().cuda()
        bias = torch.randn(shape[0], device="cuda").to(dtype)
        for m in TOKENS:
            x = torch.randn(m, shape[1], device="cuda").to(dtype)
            y = CUDA_KEPT.run(x, weight, bias)
            size = x.double().abs() @ matrix.abs().T + bias.double().abs() + 1
            error = (y.double() - x.double() @ matrix.T - bias.double()).abs()
            assert bool((error <= 3 * torch.finfo(dtype).eps * size).all()), (spec.label(), shape, m)


def test_rows_of_many_inputs() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (300, 28672))
    weight, matrix = prepared(tensor), tensor.dequantize(torch.float64).cuda()
    for m in (1, 5):
        x = torch.randn(m, 28672, device="cuda").half()
        size = x.double().abs() @ matrix.abs().T + 1
        error = (CUDA_KEPT.run(x, weight).double() - x.double() @ matrix.T).abs()
        assert bool((error <= 3 * torch.finfo(torch.float16).eps * size).all())


@pytest.mark.parametrize("m", [1, 16, 1024])
def test_a_graph_replays_the_same_bits(m: int) -> None:
    weight = prepared(random_kept(QuantSpec(4, 16, hadamard=512, sparsity=0.5), (2048, 1536)))
    x = torch.randn(m, 1536, device="cuda").half()
    expected = CUDA_KEPT.run(x, weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CUDA_KEPT.run(x, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = CUDA_KEPT.run(x, weight)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_a_thousand_runs_give_the_same_bits() -> None:
    """Whichever warp completes an octet."""
    weight = prepared(random_kept(QuantSpec(3, 16, sparsity=0.5), (4096, 4096)))
    x = torch.randn(1, 4096, device="cuda").half()
    expected = CUDA_KEPT.run(x, weight)
    assert all(torch.equal(CUDA_KEPT.run(x, weight), expected) for _ in range(1000))


def test_torch_compiles_around_it() -> None:
    weight = prepared(random_kept(QuantSpec(4, 16, sparsity=0.5), (512, 256)))

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(CUDA_KEPT.run(x * 2, weight)) + 1

    for m in (1, 40):
        x = torch.randn(m, 256, device="cuda").half()
        assert torch.allclose(torch.compile(step, fullgraph=True)(x), step(x), atol=1e-2)
