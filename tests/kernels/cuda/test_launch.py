"""What reaches the driver; the driver itself is a fake, except where there is a GPU."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.errors import KernelError
from quantc.kernels.cuda import build, launch
from quantc.kernels.cuda.build import Compiled
from quantc.kernels.cuda.device import unavailable
from quantc.kernels.cuda.launch import refusal, warm
from quantc.kernels.cuda.program import Launch, Program
from tests.kernels.cuda.fakes import FakeMachine, on_gpu

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
GPU = torch.device("cuda", 0)


@pytest.fixture
def built(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Program, str]]:
    """What was compiled, by a compiler that makes b"cubin"."""
    seen: list[tuple[Program, str]] = []

    def compile_program(program: Program, architecture: str) -> Compiled:
        seen.append((program, architecture))
        return Compiled(b"cubin", None)

    monkeypatch.setattr(build, "compile_program", compile_program)
    return seen


def job(program: Program, *arguments: Any, shared: int = 0, grid: tuple[int, int, int] = (3, 2, 1)) -> Launch:
    return Launch(program, grid, (128, 1, 1), shared, arguments)


def test_arguments_arrive_as_their_c_types(machine: FakeMachine, built: Any, scale: Program) -> None:
    machine.driver.kinds = (POINTER, POINTER, INT, INT, INT, FLOAT, POINTER)
    whole = on_gpu(torch.arange(10))
    rest = whole[3:]
    launch.launch(job(scale, whole, None, -1, 2**31 - 1, True, 0.1, rest))
    assert machine.driver.arguments == [
        whole.data_ptr(), None, -1, 2**31 - 1, 1, ctypes.c_float(0.1).value, whole.data_ptr() + 3 * 8,
    ]  # fmt: skip


def test_the_grid_and_torchs_current_stream_arrive(machine: FakeMachine, built: Any, scale: Program) -> None:
    machine.driver.kinds = (POINTER,)
    y = on_gpu(torch.zeros(1))
    for stream in (0, 77):
        machine.streams[0] = stream
        launch.launch(job(scale, y, shared=512))
    function = 2000  # of the fake's second call
    assert machine.driver.of("launchKernel") == [(function, 3, 2, 1, 128, 1, 1, 512, s, 0) for s in (0, 77)]


def test_a_program_is_loaded_once_for_each_device(machine: FakeMachine, built: Any, scale: Program) -> None:
    machine.streams = {0: 10, 1: 11}
    machine.driver.kinds = (POINTER,)
    for index in (0, 1, 1, 0):
        launch.launch(job(scale, on_gpu(torch.zeros(1), index)))
    assert built == [(scale, "sm_90")] * 2
    assert machine.driver.loaded_on == [0, 1]
    assert machine.driver.of("moduleGetFunction") == [(100, "scale"), (400, "scale")]
    assert [call[-2] for call in machine.driver.of("launchKernel")] == [10, 11, 11, 10]
    assert machine.current == 0


def test_variants_of_a_source_are_loaded_apart(machine: FakeMachine, built: Any, scale: Program) -> None:
    machine.driver.kinds = (POINTER,)
    other = replace(scale, defines=(("FACTOR", "3.0f"),))
    for program in (scale, other, scale):
        launch.launch(job(program, on_gpu(torch.zeros(1))))
    assert [program for program, _ in built] == [scale, other]
    assert len({call[0] for call in machine.driver.of("launchKernel")}) == 2


def test_a_warm_program_is_not_loaded_again(machine: FakeMachine, built: Any, scale: Program) -> None:
    warm(scale, GPU, shared=100_000)
    calls = len(machine.driver.calls)
    machine.driver.kinds = (POINTER,)
    launch.launch(job(scale, on_gpu(torch.zeros(1)), shared=100_000))
    assert [call[0] for call in machine.driver.calls[calls:]] == ["launchKernel"]


def test_shared_memory_past_48_kib_is_asked_for_once(machine: FakeMachine, built: Any, scale: Program) -> None:
    machine.driver.kinds = (POINTER,)
    for shared in (0, 48 * 1024, 60_000, 60_000, 50_000, 100_000, 100_000):
        launch.launch(job(scale, on_gpu(torch.zeros(1)), shared=shared))
    assert machine.driver.of("funcSetAttribute") == [(2000, 8, 60_000), (2000, 8, 100_000)]
    assert len(machine.driver.of("moduleLoadData")) == 1


def test_a_thread_new_to_the_gpu_gets_its_context(machine: FakeMachine, built: Any, scale: Program) -> None:
    machine.driver.context = 0
    warm(scale, torch.device("cuda:1"))
    assert machine.devices_set == [1]


def test_a_grid_without_blocks_is_nothing(machine: FakeMachine, built: Any, scale: Program) -> None:
    launch.launch(job(scale, on_gpu(torch.zeros(0)), grid=(0, 1, 1)))
    assert machine.driver.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 2), "the tensors are on none; a launch needs all of them on one CUDA device."),
        ((torch.zeros(1),), "the tensors are on cpu; a launch needs"),
        ((on_gpu(torch.zeros(1)), on_gpu(torch.zeros(1), 1)), "the tensors are on cuda:0, cuda:1; a launch needs"),
        ((on_gpu(torch.zeros(1)), 2**31), "the argument 2147483648 is no 32-bit int, and kernels take no other."),
    ],
)
def test_arguments_a_kernel_cannot_take(
    machine: FakeMachine, built: Any, scale: Program, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        launch.launch(job(scale, *arguments))
    assert str(caught.value).startswith(message)
    assert machine.driver.of("launchKernel") == []


# What fails


@pytest.mark.parametrize(
    ("refuses", "words"),
    [
        ("moduleLoadData", "cannot load scale of scale.cu on cuda:0 (CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel"),
        ("moduleGetFunction", "cannot load scale of scale.cu on cuda:0 ("),
        ("funcSetAttribute", "cannot give 60000 bytes of shared memory to scale of scale.cu on cuda:0 ("),
        ("launchKernel", "cannot start scale of scale.cu on cuda:0 ("),
    ],
)
def test_what_the_driver_refuses_is_a_sentence(
    machine: FakeMachine, built: Any, scale: Program, refuses: str, words: str
) -> None:
    machine.driver.refuses = refuses
    with pytest.raises(KernelError) as caught:
        launch.launch(job(scale, on_gpu(torch.zeros(1)), shared=60_000))
    assert f"the driver {words}" in str(caught.value)
    assert str(caught.value).endswith("); update the driver, or run on the CPU.")


def test_a_program_that_loads_is_not_refused(machine: FakeMachine, built: Any, scale: Program) -> None:
    assert refusal(scale, GPU, shared=60_000) is None
    assert machine.driver.of("funcSetAttribute") == [(2000, 8, 60_000)]


def test_a_machine_without_a_gpu_refuses_before_anything_is_compiled(built: Any, scale: Program) -> None:
    assert refusal(scale, torch.device("cpu")) == "runs on cuda, not on cpu"
    assert built == []


def test_more_shared_memory_than_the_gpu_has_is_refused_for_this_program_only(
    machine: FakeMachine, built: Any, scale: Program, caplog: pytest.LogCaptureFixture
) -> None:
    assert refusal(scale, GPU, 300_000) == "needs 300000 bytes of shared memory a block, and this GPU has 232448"
    assert refusal(scale, GPU) is None
    assert caplog.records == []


def compiler_fails(machine: FakeMachine) -> None:
    def fail(*_: Any) -> Compiled:
        raise KernelError("NVRTC cannot compile scale.cu (no reason); report it.")

    machine.monkeypatch.setattr(build, "compile_program", fail)


def source_is_missing(machine: FakeMachine) -> None:
    def fail(*_: Any) -> Compiled:
        raise FileNotFoundError(2, "No such file or directory", "scale.cu")

    machine.monkeypatch.setattr(build, "compile_program", fail)


def driver_refuses(machine: FakeMachine) -> None:
    machine.driver.refuses = "moduleLoadData"


@pytest.mark.parametrize(
    ("cause", "words"),
    [(compiler_fails, "no reason"), (source_is_missing, "scale.cu"), (driver_refuses, "NO_BINARY_FOR_GPU")],
)
def test_a_failed_build_refuses_every_cuda_kernel_there_with_one_warning(
    machine: FakeMachine, built: Any, scale: Program, caplog: pytest.LogCaptureFixture, cause: Any, words: str
) -> None:
    cause(machine)
    with caplog.at_level(logging.WARNING):
        reason = refusal(scale, GPU)
        assert reason is not None
        assert reason.startswith("failed on cuda:0: ")
        assert words in reason
        assert refusal(replace(scale, entry="other"), GPU) == reason
        assert unavailable(GPU) == reason
    (record,) = caplog.records
    assert words in record.getMessage()
    assert record.levelname == "WARNING"


def test_kernels_are_imported_without_cupy() -> None:
    code = (
        "import sys; sys.modules['cupy'] = sys.modules['cupy_backends'] = None\n"
        "import quantc.kernels.registry, quantc.kernels.cuda.catalogue, quantc.kernels.cuda.launch\n"
        "import quantc.runtime.doctor\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


# On a GPU


@pytest.mark.gpu
def test_a_launch_multiplies_on_the_gpu(sources: Path, scale: Program) -> None:
    assert refusal(scale, GPU, shared=64 * 1024 - 1024) is None
    y = torch.arange(1000, device=GPU, dtype=torch.float32)
    item = Launch(scale, (8, 1, 1), (128, 1, 1), 64 * 1024 - 1024, (y, 999))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which fills y
    with torch.cuda.stream(stream):
        launch.launch(item)
    stream.synchronize()
    expected = torch.arange(1000) * torch.where(torch.arange(1000) < 999, 2, 1)
    assert y.tolist() == expected.tolist()


@pytest.mark.gpu
def test_a_warm_launch_is_captured_into_a_graph(sources: Path, scale: Program) -> None:
    warm(scale, GPU)
    y = torch.ones(1000, device=GPU)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.launch(Launch(scale, (8, 1, 1), (128, 1, 1), 0, (y, 1000)))
    for _ in range(3):
        graph.replay()
    assert y.tolist() == [8.0] * 1000
