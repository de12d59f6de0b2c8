"""The operator for weights with dropped groups: on a machine that is said to have a GPU, and on the host harness."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from quantc.formats import GROUP_SPARSE
from quantc.kernels.cuda import kept, resources
from quantc.kernels.cuda import product as product_module
from quantc.kernels.cuda.kept import CUDA_KEPT
from quantc.kernels.cuda.packed import Device
from quantc.kernels.cuda.program import Launch
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose
from quantc.numerics.qtensor import QTensor
from quantc.spec import QuantSpec
from tests.kernels.cuda.fakes import FakeMachine
from tests.kernels.cuda.kept_weights import prepare, random_kept
from tests.kernels.test_kernels import check_product
from tests.simt.harness import unavailable

needs_harness = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
GPU = torch.device("cuda", 0)
SPEC = QuantSpec(4, 16, sparsity=0.5)


@pytest.fixture(autouse=True)
def _forget() -> None:
    resources.capability.cache_clear()


def product(tensor: QTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return kept.multiply(x, prepare(tensor), bias)


@needs_harness
@pytest.mark.parametrize(
    ("rows", "entries"),
    [
        ((1,), ["kept_decode"]),
        ((2, 4), ["kept_decode"]),
        ((17,), ["kept_decode"] * 3),
        ((5, 5), ["kept_dequantize"]),
    ],
)
def test_the_program_fits_the_number_of_tokens(
    launches: list[Launch], rows: tuple[int, ...], entries: list[str]
) -> None:
    tensor = random_kept(replace(SPEC, rank=2), (24, 40))
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(*rows, 40, generator=generator).bfloat16(), torch.randn(24, generator=generator)
    y = product(tensor, x, bias)
    assert [launch.program.entry for launch in launches] == entries
    assert y.dtype == x.dtype
    ones, whole = torch.ones(*rows, 1), tensor.effective_weight().double()
    check_product(y, torch.cat([x, ones], -1), torch.cat([whole, bias[:, None].double()], 1))


@needs_harness
def test_rows_too_long_for_eight_tokens_take_more_launches(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_kept(SPEC, (16, 520))
    x = torch.randn(5, 520, generator=torch.Generator().manual_seed(0)).bfloat16()
    for limit, count in ((4 * 2 * 544, 3), (2 * 544, 5)):
        monkeypatch.setattr(product_module, "device_limits", lambda _, limit=limit: Device(2, limit))
        launches.clear()
        check_product(product(tensor, x), x, tensor.dequantize(torch.float64))
        assert len(launches) == count
        assert all(launch.shared <= limit for launch in launches)


@needs_harness
def test_no_bias_no_tokens_and_inputs_that_lie_anyhow(launches: list[Launch]) -> None:
    tensor = random_kept(SPEC, (16, 64))
    wide = torch.randn(3, 5, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    for x in (wide[0, :, 3:67], wide[:2, 0, :128:2], wide[:, 2, :64], wide[:2, :3, :64].transpose(0, 1)):
        check_product(product(tensor, x), x, tensor.dequantize(torch.float64))
    assert product(tensor, wide[:0, 0, :64]).shape == (0, 16)
    assert len(launches) == 4


@needs_harness
@pytest.mark.parametrize(("rows", "rotated"), [(1, 1), (6, 0)])
def test_x_is_rotated_first(launches: list[Launch], rows: int, rotated: int) -> None:
    tensor = random_kept(replace(SPEC, hadamard=16), (20, 48))
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = REFERENCE.prepare(GROUP_SPARSE.pack(tensor), tensor.spec, tensor.shape, x.dtype)
    assert torch.allclose(product(tensor, x).float(), REFERENCE.run(x, parts).float(), atol=0.1)
    assert [dict(launch.program.defines)["ROTATED"] for launch in launches] == [rotated]


def test_a_rotation_that_does_not_exist_is_refused(launches: list[Launch]) -> None:
    tensor = random_kept(replace(SPEC, hadamard=8), (8, 520))
    with pytest.raises(ValueError, match="520"):
        kept.multiply(torch.ones(1, 520).half(), replace(prepare(tensor), hadamard=520), None)
    assert launches == []


@needs_harness
def test_gradients_reach_x(launches: list[Launch]) -> None:
    tensor = random_kept(replace(SPEC, rank=2), (24, 40))
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = CUDA_KEPT.run(x, prepare(tensor), torch.ones(24))
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    expected = tensor.effective_weight().double().sum(0).expand(3, 40)
    assert torch.allclose(gradient.double(), expected, atol=0.2)
    assert [launch.program.entry for launch in launches] == ["kept_decode", "kept_dequantize"]


def test_the_operator_has_a_shape_for_the_compiler() -> None:
    weight = prepare(random_kept(SPEC, (24, 64)))
    parts = {field.name: getattr(weight, field.name) for field in fields(weight)}
    on_meta = {name: part.to("meta") for name, part in parts.items() if isinstance(part, torch.Tensor)}
    x = torch.empty(2, 3, 64, dtype=torch.float16, device="meta")
    y = CUDA_KEPT.run(x, replace(weight, **on_meta), None)
    assert y.shape == (2, 3, 24)
    assert y.dtype == torch.float16
    assert y.device.type == "meta"


@pytest.mark.parametrize(
    ("spec", "shape", "dtype", "reason"),
    [
        (QuantSpec(4, 32), (64, 64), torch.float16, "is for weights of which whole groups are dropped"),
        (
            QuantSpec(4, 16, two_of_four=True), (64, 64), torch.float16,
            "is for weights of which whole groups are dropped",
        ),
        (SPEC, (64, 64), torch.float32, "runs in float16 and bfloat16, not in float32"),
        (replace(SPEC, bits=7), (64, 64), torch.float16, "has codes of 2, 3, 4, 5, 6, 8 bits, not 7"),
        (SPEC, (64, 60), torch.float16, "needs inputs in steps of 8, not 60"),
        (SPEC, (64, 1 << 17), torch.float16, "needs rows of up to 65520 inputs in groups of 16, not 131072"),
        (
            replace(SPEC, bits=8), (64, 1 << 17), torch.float16,
            "needs rows of up to 116208 inputs in groups of 16, not 131072",
        ),
        (SPEC, (1 << 20, 64), torch.float16, "needs up to 524288 output channels, not 1048576"),
    ],
)  # fmt: skip
def test_why_it_does_not_run(
    machine: FakeMachine, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, reason: str
) -> None:
    assert CUDA_KEPT.supports(spec, shape, GPU, dtype) == reason
    assert CUDA_KEPT.supports(spec, shape, torch.device("cpu"), dtype) == "runs on cuda, not on cpu"


def test_an_old_gpu_runs_float16_only(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "refusal", lambda program, device, shared: None)
    machine.torch_cuda(get_device_capability=(7, 5))
    assert CUDA_KEPT.supports(SPEC, (64, 64), GPU, torch.bfloat16) == "needs compute capability 8.0 for bfloat16"
    assert CUDA_KEPT.supports(SPEC, (64, 64), GPU, torch.float16) is None


@pytest.mark.parametrize(
    ("k", "hadamard", "tokens", "shared"),
    [(4096, 0, [1, 8], 65792), (4096, 64, [1, 8, 1], 65792), (1 << 16, 0, [1], 131104)],
)
def test_every_program_is_loaded_before_the_first_product(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, k: int, hadamard: int, tokens: list[int], shared: int
) -> None:
    asked = {}
    monkeypatch.setattr(kept, "refusal", lambda program, device, needed: asked.update({program: needed}))
    spec = replace(SPEC, bits=5, hadamard=hadamard)
    assert choose(spec, (64, k), GPU, torch.bfloat16).kernel is CUDA_KEPT
    assert [program.entry for program in asked] == ["kept_decode"] * len(tokens) + ["kept_dequantize"]
    assert [dict(program.defines).get("TOKENS") for program in asked] == [*tokens, None]
    assert max(asked.values()) == shared
    monkeypatch.setattr(kept, "refusal", lambda program, device, shared: "failed on cuda:0: no luck")
    assert choose(spec, (64, k), GPU, torch.bfloat16).refused[CUDA_KEPT.name] == "failed on cuda:0: no luck"
