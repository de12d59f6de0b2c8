"""The torch operator and the kernel behind it: on a machine that is said to have a GPU, and on the host harness."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cuda import dense, packed, resources
from quantc.kernels.cuda import product as product_module
from quantc.kernels.cuda.dense import CUDA_PACKED
from quantc.kernels.cuda.layout import prepare
from quantc.kernels.cuda.program import Launch
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose
from quantc.numerics.qtensor import QTensor
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.kernels.cuda.fakes import FakeMachine
from tests.kernels.test_kernels import check_product, random_qtensor
from tests.simt.harness import unavailable

needs_harness = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _forget() -> None:
    resources.capability.cache_clear()


@pytest.fixture
def launches(launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """As in conftest.py, on an Ampere, with buffers that stay."""
    monkeypatch.setattr(dense, "capability", lambda _: 80)
    buffers: dict[tuple[int, ...], torch.Tensor] = {}
    monkeypatch.setattr(
        product_module,
        "unpacked_buffer",
        lambda _, __, dtype, shape: buffers.setdefault(shape, torch.empty(shape, dtype=dtype)),
    )
    return launches


def product(tensor: QTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return dense.multiply(x, prepare(DENSE.pack(tensor), tensor.spec, tensor.shape), bias)


def whole(tensor: QTensor) -> torch.Tensor:
    return tensor.effective_weight().double()


@needs_harness
@pytest.mark.parametrize(
    ("rows", "entry"), [((1,), "decode"), ((2, 8), "decode"), ((17,), "matmul"), ((512,), "dequantize")]
)
def test_the_program_fits_the_number_of_tokens(launches: list[Launch], rows: tuple[int, ...], entry: str) -> None:
    tensor = random_qtensor(QuantSpec(4, 32, rank=2), (24, 40))
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(*rows, 40, generator=generator).bfloat16(), torch.randn(24, generator=generator)
    y = product(tensor, x, bias)
    assert [launch.program.entry for launch in launches] == [entry]
    assert y.dtype == x.dtype
    ones = torch.ones(*rows, 1)
    check_product(y, torch.cat([x, ones], -1), torch.cat([whole(tensor), bias[:, None].double()], 1))


@needs_harness
def test_no_bias_no_tokens_and_inputs_that_lie_anyhow(launches: list[Launch]) -> None:
    tensor = random_qtensor(QuantSpec(3, 64), (16, 64))
    wide = torch.randn(3, 5, 200, generator=torch.Generator().manual_seed(0)).half()
    for x in (wide[..., 3:67], wide[..., :128:2], wide[:, 2, :64], wide[..., :64].transpose(0, 1)):
        check_product(product(tensor, x), x, whole(tensor))
    assert product(tensor, wide[:0, 0, :64]).shape == (0, 16)
    assert len(launches) == 4


@needs_harness
def test_x_is_rotated_first(launches: list[Launch]) -> None:
    spec = QuantSpec(4, 32, hadamard=16)
    tensor = random_qtensor(spec, (20, 48))
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)).half()
    expected = REFERENCE.run(x, REFERENCE.prepare(DENSE.pack(tensor), spec, tensor.shape, x.dtype))
    assert torch.allclose(product(tensor, x).float(), expected.float(), atol=0.02)


@needs_harness
def test_gradients_reach_x(launches: list[Launch]) -> None:
    tensor = random_qtensor(QuantSpec(4, 32, rank=2), (24, 40))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    weight = prepare(DENSE.pack(tensor), tensor.spec, tensor.shape)
    y = CUDA_PACKED.run(x, weight, torch.ones(24))
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.allclose(gradient.double(), whole(tensor).sum(0).expand(3, 40), atol=0.05)
    assert [launch.program.entry for launch in launches] == ["decode", "dequantize"]


def test_the_operator_has_a_shape_for_the_compiler() -> None:
    tensor = random_qtensor(QuantSpec(4, 32), (24, 64))
    weight = prepare({name: part.to("meta") for name, part in DENSE.pack(tensor).items()}, tensor.spec, tensor.shape)
    x = torch.empty(2, 3, 64, dtype=torch.float16, device="meta")
    y = CUDA_PACKED.run(x, weight, None)
    assert y.shape == (2, 3, 24)
    assert y.dtype == torch.float16
    assert y.device.type == "meta"


@pytest.mark.parametrize(
    ("spec", "shape", "dtype", "reason"),
    [
        (QuantSpec(4, 64), (64, 64), torch.float32, "runs in float16 and bfloat16, not in float32"),
        (QuantSpec(7, 64), (64, 64), torch.float16, "has codes of 2, 3, 4, 5, 6, 8 bits, not 7"),
        (QuantSpec(4, 64), (64, 60), torch.float16, "needs inputs in steps of 8, not 60"),
        (QuantSpec(4, 48), (64, 96), torch.float16, "needs per_oc groups of a multiple of 32, not 48"),
        (QuantSpec(4, 8, "per_ic"), (64, 64), torch.float16, "needs per_ic groups of a multiple of 16, not 8"),
    ],
)
def test_why_it_does_not_run(
    machine: FakeMachine, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, reason: str
) -> None:
    assert CUDA_PACKED.supports(spec, shape, GPU, dtype) == reason
    assert choose(spec, shape, GPU, dtype).kernel is REFERENCE
    assert CUDA_PACKED.supports(spec, shape, torch.device("cpu"), dtype) == "runs on cuda, not on cpu"


def test_an_old_gpu_runs_float16_only_and_without_the_pipeline(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(dense, "refusal", lambda program, device, shared: asked.append(program.entry))
    machine.torch_cuda(get_device_capability=(7, 5))
    spec = QuantSpec(4, 64)
    assert CUDA_PACKED.supports(spec, (64, 64), GPU, torch.bfloat16) == "needs compute capability 8.0 for bfloat16"
    assert CUDA_PACKED.supports(spec, (64, 64), GPU, torch.float16) is None
    assert set(asked) == {"decode", "dequantize"}
    assert dense.crossover(75) == packed.DECODE_TOKENS[-1] + 1


def test_every_program_is_loaded_before_the_first_product(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    monkeypatch.setattr(dense, "refusal", lambda program, device, shared: asked.update({program: shared}))
    spec = QuantSpec(2, WHOLE_ROW, symmetric=True)
    assert choose(spec, (64, 96), GPU, torch.bfloat16).kernel is CUDA_PACKED
    assert [program.entry for program in asked] == ["decode", "decode", "dequantize", "matmul", "matmul"]
    assert max(asked.values()) > 48 * 1024
    monkeypatch.setattr(dense, "refusal", lambda program, device, shared: "failed on cuda:0: no luck")
    assert choose(spec, (64, 96), GPU, torch.bfloat16).refused[CUDA_PACKED.name] == "failed on cuda:0: no luck"


def test_streams_do_not_share_their_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "WORKSPACE_FLOATS", 4)
    monkeypatch.setattr(resources, "WORKSPACE_COUNTERS", 4)
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    resources.workspace.cache_clear()
    first, again, other = resources.workspace(0, 0), resources.workspace(0, 0), resources.workspace(0, 7)
    resources.workspace.cache_clear()
    assert first is again
    assert first.partial.data_ptr() != other.partial.data_ptr()
    assert not first.counters.any()
