"""The packed matmul on a real GPU: every path against float64, in CUDA graphs, and compiled by torch."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cuda.dense import CUDA_PACKED
from quantc.kernels.cuda.layout import CODE_BITS
from quantc.kernels.registry import choose
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.kernels.test_kernels import random_qtensor

pytestmark = pytest.mark.gpu

GROUPS = ((32, "per_oc"), (64, "per_oc"), (WHOLE_ROW, "per_oc"), (16, "per_ic"), (64, "per_ic"))
SHAPES = ((1000, 1600), (64, 8), (1, 520))
TOKENS = (1, 2, 8, 9, 16, 17, 33, 64, 65, 200, 700)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_products_of_every_kind(bits: int, dtype: torch.dtype) -> None:
    for (group, grouping), shape, rank in ((g, s, r) for g in GROUPS for s in SHAPES for r in (0, 2)):
        spec = QuantSpec(bits, group, grouping, rank == 0 and bits == 4, rank)  # type: ignore[arg-type]
        tensor = random_qtensor(spec, shape)
        assert choose(spec, shape, torch.device("cuda"), dtype).kernel is CUDA_PACKED
        parts = {name: part.cuda() for name, part in DENSE.pack(tensor).items()}
        weight = CUDA_PACKED.prepare(parts, spec, shape, dtype)
        matrix = tensor.effective_weight().double().cuda()
        bias = torch.randn(shape[0], device="cuda").to(dtype)
        for m in TOKENS:
            x = torch.randn(m, shape[1], device="cuda").to(dtype)
            y = CUDA_PACKED.run(x, weight, bias)
            size = x.double().abs() @ matrix.abs().T + bias.double().abs() + 1
            error = (y.double() - x.double() @ matrix.T - bias.double()).abs()
            assert bool((error <= 3 * torch.finfo(dtype).eps * size).all()), (spec.label(), shape, m)


def prepared(spec: QuantSpec, shape: tuple[int, int]):  # type: ignore[no-untyped-def]
    parts = {name: part.cuda() for name, part in DENSE.pack(random_qtensor(spec, shape)).items()}
    assert choose(spec, shape, torch.device("cuda"), torch.float16).kernel is CUDA_PACKED
    return CUDA_PACKED.prepare(parts, spec, shape, torch.float16)


@pytest.mark.parametrize("m", [1, 16, 64, 1024])
def test_a_graph_replays_the_same_bits(m: int) -> None:
    weight = prepared(QuantSpec(4, 128, hadamard=512), (2048, 1536))
    x = torch.randn(m, 1536, device="cuda").half()
    expected = CUDA_PACKED.run(x, weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        CUDA_PACKED.run(x, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = CUDA_PACKED.run(x, weight)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_two_streams_do_not_disturb_each_other() -> None:
    weight = prepared(QuantSpec(3, 64), (256, 4096))
    x = torch.randn(1, 4096, device="cuda").half()
    expected = CUDA_PACKED.run(x, weight)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for turn in range(200):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(CUDA_PACKED.run(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_torch_compiles_around_it() -> None:
    weight = prepared(QuantSpec(4, 64), (512, 256))

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(CUDA_PACKED.run(x * 2, weight)) + 1

    for m in (1, 40):
        x = torch.randn(m, 256, device="cuda").half()
        assert torch.allclose(torch.compile(step, fullgraph=True)(x), step(x), atol=1e-2)
