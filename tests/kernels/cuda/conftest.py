"""Nothing remembered from test to test, a cache folder for each, and a machine that is only said to have a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantc.kernels.cuda import build, device, launch, product
from quantc.kernels.cuda.packed import Device, Workspace
from quantc.kernels.cuda.program import Launch, Program
from tests.kernels.cuda.fakes import FakeMachine
from tests.simt.harness import run

SCALE = """
#include "ptx.cuh"
extern "C" __global__ void scale(float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] *= FACTOR;
}
"""
REMEMBERING = (
    device.architecture, device.shared_limit, device._without_driver, device._without_compiler,
    device._refused_device, launch._driver, launch._runtime,
)  # fmt: skip


def forget() -> None:
    for function in REMEMBERING:
        function.cache_clear()
    device._failures.clear()
    launch._loaded.clear()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("QUANTC_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """torch and CuPy say that there are two H100s."""
    return FakeMachine(monkeypatch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What product.multiply starts; it runs on this CPU, where the tensors are, as if on one small GPU."""
    started: list[Launch] = []

    def start(launch: Launch) -> None:
        started.append(launch)
        run(launch)

    workspace = Workspace(torch.full((1 << 18,), float("nan")), torch.zeros(64, dtype=torch.int32))
    monkeypatch.setattr(product, "launch", start)
    monkeypatch.setattr(product, "device_index", lambda _: 0)
    monkeypatch.setattr(product, "device_limits", lambda _: Device(2, 99 * 1024))
    monkeypatch.setattr(product, "workspace", lambda *_: workspace)
    # As if another weight had been there before.
    monkeypatch.setattr(
        product, "unpacked_buffer", lambda _, __, dtype, shape: torch.full(shape, torch.nan, dtype=dtype)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    return started


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of sources to change, with the real header and scale.cu."""
    include = tmp_path / "sources" / "include"
    include.mkdir(parents=True)
    (include / "ptx.cuh").write_text((build.FOLDER / "include" / "ptx.cuh").read_text())
    (include.parent / "scale.cu").write_text(SCALE)
    monkeypatch.setattr(build, "FOLDER", include.parent)
    return include.parent


@pytest.fixture
def scale() -> Program:
    """scale(y, n): y (n,) float32 times 2."""
    return Program("scale.cu", "scale", (("FACTOR", "2.0f"),))
