"""A machine with a GPU, as far as torch and CuPy tell: what the code under test asks of them, and nothing more."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


class OnGpu(torch.Tensor):
    """A tensor that says it lies on cuda:<gpu>."""

    gpu = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.gpu)


def on_gpu(tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
    """The tensor, said to lie on a GPU."""
    moved = tensor.as_subclass(OnGpu)
    moved.gpu = index
    return moved


@dataclass
class FakeDriver:
    """Keeps what it is asked; `refuses` names a function that fails. kinds: the C types of the kernel's parameters."""

    machine: FakeMachine
    kinds: tuple[Any, ...] = ()
    refuses: str | None = None
    context: int = 1
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    arguments: list[Any] = field(default_factory=list)
    loaded_on: list[int] = field(default_factory=list)  # the current device at each load

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def get_build_version(self) -> int:
        return 13020

    def ctxGetCurrent(self) -> int:
        return self.context

    def moduleLoadData(self, image: bytes) -> int:
        self.loaded_on.append(self.machine.current)
        return self._record("moduleLoadData", image) * 100

    def moduleGetFunction(self, module: int, name: str) -> int:
        return self._record("moduleGetFunction", module, name) * 1000

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self._record("funcSetAttribute", function, attribute, value)

    def launchKernel(self, function: int, *rest: int) -> None:
        *shape, stream, pointers, extra = rest
        self._record("launchKernel", function, *shape, stream, extra)
        addresses = (ctypes.c_void_p * len(self.kinds)).from_address(pointers)
        self.arguments = [kind.from_address(at).value for kind, at in zip(self.kinds, addresses, strict=True)]

    def _record(self, name: str, *arguments: Any) -> int:
        if self.refuses == name:
            raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")
        self.calls.append((name, *arguments))
        return len(self.calls)


class FakeMachine:
    """torch for CUDA 13 and CuPy for 13 on an H100; tests then take away what they are about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch = monkeypatch
        self.driver = FakeDriver(self)
        self.current = 0
        self.streams = {0: 0, 1: 0}
        self.devices_set: list[int] = []  # through CuPy's runtime
        nvrtc = SimpleNamespace(getVersion=lambda: (13, 5), getSupportedArchs=lambda: (75, 80, 86, 89, 90, 100, 120))
        runtime = SimpleNamespace(
            driverGetVersion=lambda: 13010,
            cudaDevAttrMaxSharedMemoryPerBlockOptin=97,
            deviceGetAttribute=lambda attribute, index: {97: 232448}[attribute],
            setDevice=self.devices_set.append,
        )
        self.cuda = SimpleNamespace(nvrtc=nvrtc, runtime=runtime, driver=self.driver)
        self._install_torch()
        self._install_cupy()

    def torch_cuda(self, **answers: Any) -> None:
        """What functions of torch.cuda answer, whatever they are asked."""
        for name, answer in answers.items():
            self.monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)

    def module(self, name: str, **attributes: Any) -> None:
        made = ModuleType(name)
        made.__path__ = []
        made.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(made).update(attributes)
        self.monkeypatch.setitem(sys.modules, name, made)

    def _install_torch(self) -> None:
        self.monkeypatch.setattr(torch.version, "cuda", "13.0")
        self.torch_cuda(is_available=True, device_count=2, get_device_capability=(9, 0), get_device_name="NVIDIA H100")
        self.monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        self.monkeypatch.setattr(
            torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=self.streams[index])
        )
        self.monkeypatch.setattr(torch.cuda, "device", lambda index: _Switch(self, index))

    def _install_cupy(self) -> None:
        self.module("cupy", __version__="14.2.0")
        self.module("cupy.cuda", **vars(self.cuda))
        self.module("cupy_backends")
        self.module("cupy_backends.cuda")
        self.module("cupy_backends.cuda.api", driver=self.driver)


class _Switch:
    """torch.cuda.device(index)."""

    def __init__(self, machine: FakeMachine, index: int):
        self.machine, self.index = machine, index

    def __enter__(self) -> None:
        self.before, self.machine.current = self.machine.current, self.index

    def __exit__(self, *_: Any) -> None:
        self.machine.current = self.before
