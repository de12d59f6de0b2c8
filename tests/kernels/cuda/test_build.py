"""Compiling with NVRTC, which needs no GPU, and the cache."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from quantc.errors import KernelError
from quantc.files import disk_cache
from quantc.kernels.cuda import build
from quantc.kernels.cuda.build import Compiled, Resources, compile_program, parse_resources, read_request
from quantc.kernels.cuda.launch import MAX_DYNAMIC_SHARED
from quantc.kernels.cuda.program import Program
from tests.kernels.cuda.fakes import FakeMachine
from tests.kernels.cuda.needs import needs_nvrtc

ROOT = Path(__file__).parents[3]
MADE = Compiled(b"\x7fELF\n\x00code", Resources(12, 0, 0, 0, 1024))


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_program_compiles_for_an_architecture(sources: Path, scale: Program, architecture: str) -> None:
    made = compile_program(scale, architecture)
    assert made.cubin.startswith(b"\x7fELF")
    assert made.resources is not None
    assert 0 < made.resources.registers <= 32
    assert replace(made.resources, registers=0) == Resources(0, 0, 0, 0, 0)
    assert compile_program(scale, architecture) == made


@needs_nvrtc
def test_what_spills_and_shares_is_seen(sources: Path) -> None:
    (sources / "greedy.cu").write_text("""
        extern "C" __global__ void __launch_bounds__(1024) greedy(float* y) {
            __shared__ float s[512];
            float r[128];
            for (int i = 0; i < 128; ++i) r[i] = y[i * 1024 + threadIdx.x];
            s[threadIdx.x % 512] = r[0];
            __syncthreads();
            for (int i = 0; i < 128; ++i) y[i * 1024 + threadIdx.x] = r[127 - i] * s[i] + r[i];
        }""")
    found = compile_program(Program("greedy.cu", "greedy"), "sm_80").resources
    assert found is not None
    assert found.static_shared_bytes == 2048
    assert found.registers <= 64
    assert min(found.spill_stores, found.spill_loads, found.stack_bytes) > 0


@needs_nvrtc
def test_a_source_that_does_not_compile_is_an_error_with_its_first_line(sources: Path, scale: Program) -> None:
    with pytest.raises(KernelError) as caught:
        compile_program(replace(scale, defines=()), "sm_90")
    message = str(caught.value)
    assert message.startswith("NVRTC cannot compile scale.cu with --gpu-architecture=sm_90 ")
    assert '(scale.cu(5): error: identifier "FACTOR" is undefined)' in message
    assert "\n" not in message
    assert message.endswith(".")


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know_is_an_error(sources: Path, scale: Program) -> None:
    with pytest.raises(KernelError, match="sm_10.*invalid value for --gpu-architecture"):
        compile_program(scale, "sm_10")


LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'one_more' for 'sm_80'
ptxas info    : Function properties for one_more
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 8 bytes cumulative stack size
ptxas info    : Function properties for helper
    1 bytes stack frame, 2 bytes spill stores, 3 bytes spill loads
\0"""


def test_resources_are_those_of_the_entry_and_what_it_calls() -> None:
    assert parse_resources(LOG, "one") == Resources(12, 0, 0, 0, 1024)
    assert parse_resources(LOG, "one_more") == Resources(255, 18, 27, 9, 0)


@pytest.mark.parametrize("log", ["", "\0", "ptxas info : Compiling entry function 'one' for 'sm_80'", LOG[:200]])
def test_a_log_that_does_not_tell_is_no_error(log: str) -> None:
    assert parse_resources(log, "one") is None


# The cache


@pytest.fixture
def compiled(machine: FakeMachine, sources: Path, monkeypatch: pytest.MonkeyPatch) -> list[build.Request]:
    """What was compiled, by a compiler that always makes MADE."""
    requests: list[build.Request] = []

    def compile_request(request: build.Request) -> Compiled:
        requests.append(request)
        return MADE

    monkeypatch.setattr(build, "_compile", compile_request)
    return requests


@pytest.mark.parametrize("made", [MADE, Compiled(b"", None), Compiled(b"\n\n", None)])
def test_the_second_time_nothing_is_compiled(
    made: Compiled, machine: FakeMachine, sources: Path, scale: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_compile", lambda request: made)
    assert compile_program(scale, "sm_90") == made
    monkeypatch.setattr(build, "_compile", lambda request: pytest.fail("compiled again"))
    assert compile_program(scale, "sm_90") == made


def test_whatever_a_cubin_depends_on_is_in_the_key(machine: FakeMachine, sources: Path, scale: Program) -> None:
    def key(architecture: str = "sm_90", **changes: object) -> str:
        return read_request(replace(scale, **changes), architecture).key()

    first = key()
    assert key() == first
    (sources / "other.cu").write_text((sources / "scale.cu").read_text())
    keys = [first, key("sm_80"), key(entry="other"), key(source="other.cu"), key(defines=(("FACTOR", "3.0f"),))]
    machine.module("cupy", __version__="15.0.0")
    keys.append(key())
    machine.cuda.nvrtc.getVersion = lambda: (13, 6)
    keys.append(key())
    for path in (sources / "include" / "ptx.cuh", sources / "include" / "new.cuh", sources / "scale.cu"):
        with path.open("a") as file:
            file.write("// changed\n")
        keys.append(key())
    assert len(set(keys)) == len(keys)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        path.write_bytes({"empty": b"", "short": data[:20], "cut": data[:-1], "flipped": flipped}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "short", "cut", "flipped", "a folder"])
def test_a_damaged_entry_is_compiled_again(how: str, compiled: list[build.Request], scale: Program) -> None:
    compile_program(scale, "sm_90")
    (entry,) = disk_cache.folder("cuda").iterdir()
    damage(entry, how)
    assert compile_program(scale, "sm_90") == MADE
    assert len(compiled) == 2
    assert compile_program(scale, "sm_90") == MADE
    assert len(compiled) == (3 if how == "a folder" else 2)
    assert list(disk_cache.folder("cuda").iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_is_done_without(
    compiled: list[build.Request], scale: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTC_CACHE", str(tmp_path / "file"))
    assert compile_program(scale, "sm_90") == MADE
    assert compile_program(scale, "sm_90") == MADE
    assert len(compiled) == 2


def test_a_full_disk_leaves_nothing_behind(
    compiled: list[build.Request], scale: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert compile_program(scale, "sm_90") == MADE
    assert list(disk_cache.folder("cuda").iterdir()) == []


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTC_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert disk_cache.folder("cuda") == Path("/own/cuda")
    monkeypatch.delenv("QUANTC_CACHE")
    assert disk_cache.folder("cuda") == Path("/xdg/quantc/cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert disk_cache.folder("cuda") == Path("/home/me/.cache/quantc/cuda")


WRITE = "from quantc.files.disk_cache import store\nfor _ in range(300): store('cuda', 'key', {!r} * 100_000)"


def test_processes_that_write_the_same_entry_leave_a_whole_one() -> None:
    disk_cache.store("cuda", "key", b"a" * 100_000)
    processes = [subprocess.Popen([sys.executable, "-c", WRITE.format(letter)], cwd=ROOT) for letter in (b"a", b"b")]
    seen = set()
    while any(process.poll() is None for process in processes):
        seen.add(disk_cache.load("cuda", "key"))
    assert seen <= {b"a" * 100_000, b"b" * 100_000}
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.name for path in disk_cache.folder("cuda").iterdir()] == ["key"]


@needs_nvrtc
def test_the_fake_machine_has_what_cupy_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy.cuda import driver, nvrtc, runtime

    fake = FakeMachine(monkeypatch)
    assert set(vars(fake.cuda.nvrtc)) <= set(dir(nvrtc))
    assert set(vars(fake.cuda.runtime)) <= set(dir(runtime))
    assert {name for name in dir(fake.driver) if name[0] != "_"} - set(vars(fake.driver)) - {"of"} <= set(dir(driver))
    assert runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin == 97
    assert driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES == MAX_DYNAMIC_SHARED


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_an_image_is_whole(scale: Program, sources: Path, architecture: str) -> None:
    image = compile_program(scale, architecture).cubin
    (programs, sections), (size, count, section_size, section_count) = (
        struct.unpack_from("<QQ", image, 32),
        struct.unpack_from("<HHHH", image, 54),
    )
    assert len(image) == max(programs + size * count, sections + section_size * section_count)
    assert build.whole_image(image) == image
    assert build.whole_image(image[:-1]) == image
    assert build.whole_image(b"no image") == b"no image"
