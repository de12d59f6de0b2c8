"""The operator for trellis codes and the kernel behind it: on a machine said to have a GPU, and on the host harness."""

from __future__ import annotations

import pytest
import torch

from quantc.formats import DENSE
from quantc.kernels.cuda import resources, trellis
from quantc.kernels.cuda.program import Launch
from quantc.kernels.cuda.trellis import CUDA_TRELLIS
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose
from quantc.numerics.qtensor import QTensor
from quantc.spec import WHOLE_ROW, QuantSpec
from tests.kernels.cuda.fakes import FakeMachine
from tests.kernels.cuda.trellis_weights import prepare, random_trellis
from tests.kernels.test_kernels import check_product
from tests.simt.harness import unavailable

needs_harness = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
GPU = torch.device("cuda", 0)
TRELLIS3 = QuantSpec(3, WHOLE_ROW, code="trellis")


@pytest.fixture(autouse=True)
def _forget() -> None:
    resources.capability.cache_clear()


def whole(tensor: QTensor) -> torch.Tensor:
    return tensor.effective_weight().double()


@needs_harness
@pytest.mark.parametrize(
    ("rows", "shape", "entry"),
    [
        ((1,), (64, 40), "trellis_decode"),
        ((2, 3), (64, 40), "trellis_decode"),
        ((17,), (64, 40), "trellis_dequantize"),
        ((3,), (64, 41), "trellis_dequantize"),
        ((3,), (96, 40), "trellis_dequantize"),
    ],
)
def test_the_program_fits_tokens_and_shape(
    launches: list[Launch], rows: tuple[int, ...], shape: tuple[int, int], entry: str
) -> None:
    tensor, generator = random_trellis(3, shape, rank=2), torch.Generator().manual_seed(0)
    x, bias = torch.randn(*rows, shape[1], generator=generator).half(), torch.randn(shape[0], generator=generator)
    y = trellis.multiply(x, prepare(tensor), bias)
    assert [launch.program.entry for launch in launches] == [entry]
    assert y.dtype == x.dtype
    check_product(y, torch.cat([x, torch.ones(*rows, 1)], -1), torch.cat([whole(tensor), bias[:, None].double()], 1))


@needs_harness
def test_inputs_that_are_strided_or_empty(launches: list[Launch]) -> None:
    tensor = random_trellis(3, (64, 64))
    weight, wide = prepare(tensor), torch.randn(2, 4, 200, generator=torch.Generator().manual_seed(0)).half()
    for x in (wide[..., 3:67], wide[..., :128:2], wide[:, 2, :64], wide[..., :64].transpose(0, 1)):
        check_product(trellis.multiply(x, weight, None), x, whole(tensor))
    assert trellis.multiply(wide[:0, 0, :64], weight, None).shape == (0, 64)
    assert len(launches) == 4


@needs_harness
def test_x_is_rotated_first(launches: list[Launch]) -> None:
    tensor = random_trellis(3, (64, 48), hadamard=16)
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(0)).half()
    expected = REFERENCE.run(x, REFERENCE.prepare(DENSE.pack(tensor), tensor.spec, tensor.shape, x.dtype))
    assert torch.allclose(trellis.multiply(x, prepare(tensor), None).float(), expected.float(), atol=0.02)


@needs_harness
def test_gradients_reach_x(launches: list[Launch]) -> None:
    tensor = random_trellis(3, (64, 40), rank=2)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    y = CUDA_TRELLIS.run(x, prepare(tensor), torch.ones(64))
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert torch.allclose(gradient.double(), whole(tensor).sum(0).expand(3, 40), atol=0.05)
    assert [launch.program.entry for launch in launches] == ["trellis_decode", "trellis_dequantize"]


def test_the_operator_has_a_shape_for_the_compiler() -> None:
    tensor = random_trellis(3, (64, 48))
    parts = {name: part.to("meta") for name, part in DENSE.pack(tensor).items()}
    weight = CUDA_TRELLIS.prepare(parts, tensor.spec, tensor.shape, torch.float32)
    y = CUDA_TRELLIS.run(torch.empty(2, 3, 48, device="meta"), weight, None)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 64), torch.float32, "meta")


def test_stored_walks_are_what_the_programs_read() -> None:
    tensor = random_trellis(2, (64, 5))
    parts = DENSE.pack(tensor)
    weight = CUDA_TRELLIS.prepare(parts, tensor.spec, tensor.shape, torch.float16)
    assert weight.walks.data_ptr() == parts["qweight"].data_ptr()
    wide = torch.empty(parts["qweight"].numel() + 3, dtype=torch.uint8)
    parts["qweight"] = wide[3:].view_as(parts["qweight"]).copy_(parts["qweight"])
    moved = CUDA_TRELLIS.prepare(parts, tensor.spec, tensor.shape, torch.float16)
    assert moved.walks.data_ptr() % 16 == 0
    assert torch.equal(moved.walks, weight.walks)


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        (QuantSpec(4, 64), torch.float16, "multiplies trellis codes, not uniform ones"),
        (TRELLIS3, torch.float64, "runs in float16, bfloat16 and float32, not in float64"),
        (TRELLIS3, torch.float32, "needs compute capability 8.0 for float32"),
        (TRELLIS3, torch.bfloat16, "needs compute capability 8.0 for bfloat16"),
    ],
)
def test_why_it_does_not_run(machine: FakeMachine, spec: QuantSpec, dtype: torch.dtype, reason: str) -> None:
    machine.torch_cuda(get_device_capability=(7, 5))
    assert CUDA_TRELLIS.supports(spec, (64, 64), GPU, dtype) == reason
    assert CUDA_TRELLIS.supports(spec, (64, 64), torch.device("cpu"), dtype) == "runs on cuda, not on cpu"


def test_every_program_is_loaded_before_the_first_product(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    monkeypatch.setattr(trellis, "refusal", lambda program, device, shared: asked.update({program: shared}))
    assert choose(TRELLIS3, (64, 64), GPU, torch.float16).kernel is CUDA_TRELLIS
    assert [program.entry for program in asked] == ["trellis_dequantize", "trellis_decode", "trellis_decode"]
    asked.clear()
    assert choose(TRELLIS3, (96, 64), GPU, torch.float16).kernel is CUDA_TRELLIS
    assert [program.entry for program in asked] == ["trellis_dequantize"]
    monkeypatch.setattr(trellis, "refusal", lambda program, device, shared: "failed on cuda:0: no luck")
    choice = choose(TRELLIS3, (64, 64), GPU, torch.float16)
    assert choice.kernel is REFERENCE
    assert choice.refused[CUDA_TRELLIS.name] == "failed on cuda:0: no luck"
