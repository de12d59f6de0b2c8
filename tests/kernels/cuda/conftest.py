"""Nothing remembered from test to test, a cache folder for each, and a machine that is only said to have a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from quantc.kernels.cuda import build, device, launch
from quantc.kernels.cuda.program import Program
from tests.kernels.cuda.fakes import FakeMachine

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
