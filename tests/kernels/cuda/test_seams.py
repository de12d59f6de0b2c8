"""Where the kernels of this folder take torch's place: on a GPU that can run them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quantc.kernels import rotation
from quantc.kernels.cuda import build, gptq, gram, hadamard
from quantc.kernels.cuda.build import Compiled
from quantc.kernels.cuda.program import Launch, Program
from quantc.numerics.hadamard import rotate
from tests.kernels.cuda.fakes import FakeMachine, on_gpu
from tests.simt.harness import run

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def compiled(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """What was compiled, by a compiler that makes b"cubin" for a machine that is only said to have a GPU."""
    seen: list[Program] = []

    def compile_program(program: Program, architecture: str) -> Compiled:
        seen.append(program)
        return Compiled(b"cubin", None)

    monkeypatch.setattr(build, "compile_program", compile_program)
    hadamard.refused.cache_clear()
    yield seen
    hadamard.refused.cache_clear()


def test_a_build_on_a_gpu_gets_both_kernels(compiled: list[Program]) -> None:
    assert isinstance(gptq.panel_for(GPU), gptq.CudaPanel)
    assert isinstance(gram.products_for(GPU), gram.Bfloat16Products)
    # What they may ask for later is compiled by then.
    assert {dict(program.defines).get("PANEL") for program in compiled} == {32, 64, None}
    assert {dict(program.defines).get("TILE") for program in compiled} == {64, 128, None}


def test_turing_keeps_its_gram_matrices_in_float32(machine: FakeMachine) -> None:
    machine.torch_cuda(get_device_capability=(7, 5))
    assert gram.products_for(GPU) is None
    assert isinstance(gptq.panel_for(GPU), gptq.CudaPanel)


def test_without_cupy_torch_does_it_all(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.torch_cuda(is_available=False)
    assert gptq.panel_for(GPU) is None
    assert gram.products_for(GPU) is None
    assert "torch finds none" in str(hadamard.refused(64, 64, torch.float16, GPU))


def test_a_rotation_says_why_it_is_refused() -> None:
    assert hadamard.refused(64, 64, torch.float16, GPU) is None
    assert hadamard.refused(64, 64, torch.float64, GPU) == "rotates float16, bfloat16 and float32, not torch.float64"


@pytest.mark.parametrize("strided", [False, True])
def test_what_the_kernel_can_do_it_does(monkeypatch: pytest.MonkeyPatch, strided: bool) -> None:
    launched: list[Launch] = []

    def on_cpu(item: Launch) -> None:
        launched.append(item)
        run(item)

    monkeypatch.setattr(hadamard, "launch", on_cpu)
    x = torch.randn(2, 3, 193, generator=torch.Generator().manual_seed(0))[..., 1:]
    x = x if strided else x.contiguous()
    y = hadamard.rotate(x, 96)
    assert y.shape == x.shape
    torch.testing.assert_close(y, rotate(x, 96), rtol=1e-5, atol=1e-5)
    assert len(launched) == 1


def test_rotations_on_a_gpu_go_to_the_kernel_unless_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(hadamard, "rotate", lambda x, block: asked.append(block))
    x = torch.randn(2, 96, requires_grad=True)
    rotation.rotate(x, 96)  # on the CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    rotation.rotate(x, 96).sum().backward()
    assert x.grad is not None
    assert asked == []
    rotation.rotate(on_gpu(x.detach()), 96)
    with torch.no_grad():
        rotation.rotate(on_gpu(x), 24)
    assert asked == [96, 24]
