"""A program compiled for one architecture: NVRTC through CuPy, and what it made is kept on disk.

CuPy is imported by the functions that need it, so that a machine without it can import the kernels.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import KernelError
from ...files import disk_cache
from .program import Program

FOLDER = Path(__file__).parent  # sources; the headers are in include/
CACHE = "cuda"  # the part of the disk cache
CACHE_FORMAT = 1  # of an entry's bytes
OPTIONS = ("--std=c++17", "--ptxas-options=-v")  # with -v the log says what the kernel takes


ELF_HEADER = 64  # bytes, of a 64-bit image


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one entry point, per thread; shared memory is per block."""

    registers: int
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    stack_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A cubin; resources is None if NVRTC's log did not tell."""

    cubin: bytes
    resources: Resources | None


@dataclass(frozen=True)
class Request:
    """All that a cubin depends on."""

    program: Program
    source: str
    headers: tuple[tuple[str, str], ...]  # name, text
    options: tuple[str, ...]

    def key(self) -> str:
        """Return the hexadecimal sha256 over the texts, the options and the versions of NVRTC and CuPy."""
        parts = [CACHE_FORMAT, asdict(self), nvrtc_version(), cupy_version()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_program(program: Program, architecture: str) -> Compiled:
    """Return the cubin of a program for an architecture such as "sm_90", from the cache where it is there.

    Raises KernelError if NVRTC refuses the source, or does not know the architecture.
    """
    request = read_request(program, architecture)
    key = request.key()
    stored = disk_cache.load(CACHE, key)
    if stored is not None:
        return _decode(stored)
    compiled = _compile(request)
    disk_cache.store(CACHE, key, _encode(compiled))
    return compiled


def read_request(program: Program, architecture: str) -> Request:
    """Return the program's source, every header in include/, and the options."""
    headers = tuple(
        (path.name, path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "include").glob("*.cuh"))
    )
    defines = tuple(f"-D{name}={value}" for name, value in program.defines)
    options = (f"--gpu-architecture={architecture}", *OPTIONS, *defines)
    return Request(program, (FOLDER / program.source).read_text(encoding="utf-8"), headers, options)


def load_nvrtc() -> Any:
    """Return CuPy's module for NVRTC. Raises what importing CuPy raises."""
    from cupy.cuda import nvrtc

    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    """Return a version such as (13, 5). Raises what CuPy raises if the library is missing."""
    major, minor = load_nvrtc().getVersion()
    return int(major), int(minor)


def cupy_version() -> str:
    """Return a version such as "14.2.0"."""
    import cupy

    return str(cupy.__version__)


def _compile(request: Request) -> Compiled:
    nvrtc = load_nvrtc()
    names = tuple(name.encode() for name, _ in request.headers)
    texts = tuple(text.encode() for _, text in request.headers)
    handle = nvrtc.createProgram(request.source, request.program.source, texts, names)
    try:
        nvrtc.compileProgram(handle, request.options)
        log = str(nvrtc.getProgramLog(handle))
        return Compiled(whole_image(nvrtc.getCUBIN(handle)), parse_resources(log, request.program.entry))
    except nvrtc.NVRTCError as error:
        raise KernelError(_complaint(request, error, str(nvrtc.getProgramLog(handle)))) from error
    finally:
        nvrtc.destroyProgram(handle)


def whole_image(cubin: bytes) -> bytes:
    """Return a cubin with its last byte, which CuPy (14.2) takes for the end of a string and leaves out.

    It is the highest byte of the last program header's alignment, a zero. CuPy itself loads images without it;
    NVIDIA's own tools call them invalid.
    """
    if len(cubin) < ELF_HEADER or not cubin.startswith(b"\x7fELF"):
        return cubin
    (offset,) = struct.unpack_from("<Q", cubin, 32)
    size, count = struct.unpack_from("<HH", cubin, 54)
    return cubin + b"\0" if len(cubin) == offset + size * count - 1 else cubin


def _complaint(request: Request, error: Exception, log: str) -> str:
    lines = [line.strip() for line in log.strip("\0\n ").splitlines() if line.strip()]
    found = next((line for line in lines if "error" in line), lines[0] if lines else str(error))
    return (
        f"NVRTC cannot compile {request.program.source} with {' '.join(request.options)} ({found}); it must compile "
        "from CUDA 12.0 on, so please report this with what `quantc doctor` prints."
    )


def parse_resources(log: str, entry: str) -> Resources | None:
    """Return what ptxas -v says of an entry point; functions it calls count towards its spills and stack."""
    sections = log.split("Compiling entry function ")[1:]
    section = next((text for text in sections if text.startswith(f"'{entry}'")), None)
    if section is None:
        return None
    registers = re.search(r"Used (\d+) registers", section)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", section)
    if registers is None or not memory:
        return None
    stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
    shared = re.search(r"(\d+) bytes smem", section)
    return Resources(int(registers[1]), stores, loads, stack, int(shared[1]) if shared else 0)


def _encode(compiled: Compiled) -> bytes:
    """Return the bytes of an entry: a line of JSON, then the cubin."""
    facts = None if compiled.resources is None else asdict(compiled.resources)
    return json.dumps(facts).encode() + b"\n" + compiled.cubin


def _decode(content: bytes) -> Compiled:
    line, _, cubin = content.partition(b"\n")
    facts = json.loads(line)
    return Compiled(cubin, None if facts is None else Resources(**facts))
