"""Weights in trellis codes on a real GPU: every path against float64, in CUDA graphs, and compiled by torch."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cuda.trellis import CUDA_TRELLIS
from quantc.kernels.cuda.trellis_launch import TRELLIS_ELEMENTS, WIDTHS
from quantc.kernels.cuda.trellis_layout import TrellisWeight
from quantc.kernels.registry import choose
from quantc.numerics.qtensor import QTensor
from tests.kernels.cuda.trellis_weights import random_trellis

pytestmark = pytest.mark.gpu

SHAPES = ((1024, 1608), (100, 520), (64, 8), (288, 288), (1, 33))
TOKENS = (1, 2, 8, 9, 16, 17, 200)


def prepared(tensor: QTensor, dtype: torch.dtype = torch.float16) -> TrellisWeight:
    parts = {name: part.cuda() for name, part in DENSE.pack(tensor).items()}
    assert choose(tensor.spec, tensor.shape, torch.device("cuda"), dtype).kernel is CUDA_TRELLIS
    return CUDA_TRELLIS.prepare(parts, tensor.spec, tensor.shape, dtype)


@pytest.mark.parametrize("dtype", list(TRELLIS_ELEMENTS), ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_every_kind(bits: int, dtype: torch.dtype) -> None:
    for shape, rank in ((s, r) for s in SHAPES for r in (0, 2)):
        tensor = random_trellis(bits, shape, rank)
        weight = prepared(tensor, dtype)
        matrix = tensor.effective_weight().double().cuda()
        bias = torch.randn(shape[0], device="cuda").to(dtype)
        for m in TOKENS:
            x = torch.randn(m, shape[1], device="cuda").to(dtype)
            y = CUDA_TRELLIS.run(x, weight, bias)
            size = x.double().abs() @ matrix.abs().T + bias.double().abs() + 1
            error = (y.double() - x.double() @ matrix.T - bias.double()).abs()
            assert bool((error <= (3 * torch.finfo(dtype).eps + 2**-20) * size).all()), (tensor.spec.label(), shape, m)


@pytest.mark.parametrize("m", [1, 16, 1024])
def test_a_graph_replays_the_same_bits(m: int) -> None:
    weight = prepared(random_trellis(3, (2048, 1536), hadamard=512))
    x = torch.randn(m, 1536, device="cuda").half()
    expected = CUDA_TRELLIS.run(x, weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CUDA_TRELLIS.run(x, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = CUDA_TRELLIS.run(x, weight)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_a_thousand_runs_give_the_same_bits() -> None:
    weight = prepared(random_trellis(3, (1024, 4096)))
    x = torch.randn(1, 4096, device="cuda").half()
    expected = CUDA_TRELLIS.run(x, weight)
    assert all(torch.equal(CUDA_TRELLIS.run(x, weight), expected) for _ in range(1000))


def test_torch_compiles_around_it() -> None:
    weight = prepared(random_trellis(3, (512, 256)))

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(CUDA_TRELLIS.run(x * 2, weight)) + 1

    for m in (1, 40):
        x = torch.randn(m, 256, device="cuda").half()
        assert torch.allclose(torch.compile(step, fullgraph=True)(x), step(x), atol=1e-2)
