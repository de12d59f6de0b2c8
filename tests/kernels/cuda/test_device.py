"""Every cause that keeps CUDA kernels from running, made to happen; and the sentence it gives."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from quantc.errors import KernelError
from quantc.files import disk_cache
from quantc.kernels.cuda import device
from quantc.kernels.cuda.device import architecture, record_failure, unavailable
from quantc.runtime import doctor
from tests.kernels.cuda.fakes import FakeMachine
from tests.quantc.cli_runner import run

GPU = torch.device("cuda")


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def torch_without_cuda(machine: FakeMachine) -> None:
    machine.monkeypatch.setattr(torch.version, "cuda", None)
    machine.monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    machine.torch_cuda(is_available=False, device_count=0)


def no_gpu(machine: FakeMachine) -> None:
    machine.torch_cuda(is_available=False, device_count=0)
    machine.monkeypatch.setattr(torch.cuda, "current_device", raising(RuntimeError("No CUDA GPUs are available")))


class Broken(MetaPathFinder, Loader):
    """A cupy that is found, and fails when it is imported."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "cupy" else None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError("libcudart.so.13: cannot open shared object file\nmore about it")


def remove_cupy(machine: FakeMachine) -> None:
    machine.monkeypatch.delitem(sys.modules, "cupy")
    machine.monkeypatch.delitem(sys.modules, "cupy.cuda")


def no_cupy(machine: FakeMachine) -> None:
    remove_cupy(machine)
    machine.monkeypatch.setattr(device, "find_spec", lambda name: None)
    machine.monkeypatch.setattr(doctor, "find_spec", lambda name: None)


def no_cupy_for_12(machine: FakeMachine) -> None:
    no_cupy(machine)
    machine.monkeypatch.setattr(torch.version, "cuda", "12.8")


def no_cupy_for_14(machine: FakeMachine) -> None:
    no_cupy(machine)
    machine.monkeypatch.setattr(torch.version, "cuda", "14.0")


def broken_cupy(machine: FakeMachine) -> None:
    remove_cupy(machine)
    machine.monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])


def no_nvrtc(machine: FakeMachine) -> None:
    machine.cuda.nvrtc.getVersion = raising(RuntimeError("CuPy failed to load libnvrtc.so.13: OSError\nmore"))


def no_nvrtc_for_12(machine: FakeMachine) -> None:
    no_nvrtc(machine)
    machine.driver.get_build_version = lambda: 12090  # type: ignore[method-assign]


def old_driver(machine: FakeMachine) -> None:
    machine.monkeypatch.setattr(torch.version, "cuda", "12.8")
    machine.cuda.runtime.driverGetVersion = lambda: 12080


def old_gpu(machine: FakeMachine) -> None:
    machine.torch_cuda(get_device_capability=(7, 0), get_device_name="Tesla V100")


def new_gpu(machine: FakeMachine) -> None:
    machine.torch_cuda(get_device_capability=(15, 0), get_device_name="NVIDIA X100")


CAUSES = [
    (torch_without_cuda, "needs CUDA, and this torch (2.13.0+cpu) is built without it"),
    (no_gpu, "needs a GPU, and torch finds none that it can use; check the driver with nvidia-smi"),
    (no_cupy, "needs CuPy, which is not installed: pip install 'cupy-cuda13x>=14' 'nvidia-cuda-nvrtc>=13,<14'"),
    (no_cupy_for_12, "needs CuPy, which is not installed: pip install 'cupy-cuda12x>=14' nvidia-cuda-nvrtc-cu12"),
    (
        no_cupy_for_14,
        "needs CuPy, which is not installed: pip install 'cupy-cuda12x>=14' nvidia-cuda-nvrtc-cu12 or, for CUDA 13, "
        "'cupy-cuda13x>=14' 'nvidia-cuda-nvrtc>=13,<14'",
    ),
    (
        broken_cupy,
        "needs CuPy, which is installed but cannot be imported: libcudart.so.13: cannot open shared object file",
    ),
    (
        no_nvrtc,
        "needs NVRTC, which CuPy cannot load (CuPy failed to load libnvrtc.so.13: OSError): "
        "pip install 'nvidia-cuda-nvrtc==13.*'",
    ),
    (
        no_nvrtc_for_12,
        "needs NVRTC, which CuPy cannot load (CuPy failed to load libnvrtc.so.13: OSError): "
        "pip install nvidia-cuda-nvrtc-cu12",
    ),
    (
        old_driver,
        "is compiled by NVRTC 13.5, and the driver runs CUDA 12.8 at most: update the driver, or uninstall CuPy and "
        "pip install 'cupy-cuda12x>=14' nvidia-cuda-nvrtc-cu12",
    ),
    (old_gpu, "needs compute capability 7.5 or later, and Tesla V100 has 7.0"),
    (new_gpu, "is compiled by NVRTC 13.5, which knows no such GPU (NVIDIA X100 has 15.0): update it and CuPy"),
]


@pytest.mark.parametrize(("cause", "reason"), CAUSES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_cause_has_its_sentence_here_and_in_the_doctor(
    machine: FakeMachine, cause: Callable[[FakeMachine], None], reason: str
) -> None:
    cause(machine)
    assert unavailable(GPU) == reason
    assert unavailable() == reason
    assert doctor.describe_cuda_kernels() == f"Not ready: a CUDA kernel {reason}."


def test_a_machine_that_has_everything_is_ready(machine: FakeMachine) -> None:
    assert unavailable() is None
    assert unavailable(GPU) is None
    assert unavailable(torch.device("cuda:1")) is None
    assert doctor.describe_cuda_kernels() == (
        f"Ready: compiled for sm_90 by NVRTC 13.5, kept in {disk_cache.folder('cuda')}."
    )


def test_other_devices_are_refused_without_a_look_at_the_machine() -> None:
    assert unavailable(torch.device("cpu")) == "runs on cuda, not on cpu"
    assert unavailable(torch.device("meta")) == "runs on cuda, not on meta"


def test_a_device_that_is_not_there(machine: FakeMachine) -> None:
    assert unavailable(torch.device("cuda:2")) == "needs a GPU, and there is no cuda:2; torch finds 2"


def test_cupy_for_an_older_cuda_than_torchs_is_no_obstacle(machine: FakeMachine) -> None:
    """They share nothing but the driver."""
    machine.cuda.nvrtc.getVersion = lambda: (12, 9)
    assert unavailable(GPU) is None


@pytest.mark.parametrize(
    ("capability", "compiled_for"),
    [((7, 5), "sm_75"), ((8, 0), "sm_80"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((12, 1), "sm_120")],
)
def test_a_gpu_runs_code_for_the_newest_known_one_of_its_major_number(
    machine: FakeMachine, capability: tuple[int, int], compiled_for: str
) -> None:
    machine.torch_cuda(get_device_capability=capability)
    assert unavailable(GPU) is None
    assert architecture(0) == compiled_for


def test_an_nvrtc_that_does_not_list_what_it_knows_is_trusted(machine: FakeMachine) -> None:
    del machine.cuda.nvrtc.getSupportedArchs
    machine.torch_cuda(get_device_capability=(8, 7))
    assert unavailable(GPU) is None
    assert architecture(0) == "sm_87"


def test_the_machine_is_examined_once(machine: FakeMachine) -> None:
    ask = machine.cuda.nvrtc.getVersion = Mock(return_value=(13, 5))
    for _ in range(3):
        assert unavailable(GPU) is None
    assert ask.call_count == 1


def test_a_failure_is_remembered_for_its_device_and_logged_once(
    machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for error in (RuntimeError("the driver refuses; update it.\nmore"), KernelError("another")):
            reason = record_failure(GPU, error)
            assert reason == "failed on cuda:0: the driver refuses; update it"
    (record,) = caplog.records
    assert record.getMessage().startswith("No CUDA kernel runs on cuda:0, a slower one takes its place: the driver ref")
    assert unavailable(GPU) == reason
    assert unavailable(torch.device("cuda:1")) is None
    assert doctor.describe_cuda_kernels() == (
        f"Not ready: a CUDA kernel {reason}. "
        f"Ready: compiled for sm_90 by NVRTC 13.5, kept in {disk_cache.folder('cuda')}."
    )


def test_the_command_shows_the_line() -> None:
    line = json.loads(run("doctor", "--json").stdout)["machine"]["cuda kernels"]
    assert line.startswith(("Ready: compiled for sm_", "Not ready: a CUDA kernel "))
    assert line.endswith(".")
    assert "cuda kernels" in run("doctor").stdout
