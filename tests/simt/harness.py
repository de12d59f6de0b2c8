"""Runs the CUDA sources on a CPU: compiled by g++ with sanitizers against host.h, one process per launch."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

from quantc.kernels.cuda.program import Argument, Launch, Program

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels" / "cuda"
COMMON = (
    "g++",
    "-g",
    "-std=c++17",
    "-fno-omit-frame-pointer",
    "-DQUANTC_HOST",
    f"-I{KERNELS / 'include'}",
    f"-I{HERE}",
)
RUNTIME = (*COMMON, "-O2", "-c")
# contract=off: a * b + c stays two roundings, so that what must be one is written as fmaf. Locals that were never
# written hold a pattern (-1.7e38 as a float) and not by chance a zero.
KERNEL = (
    *(*COMMON, "-O1", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("-ftrivial-auto-var-init=pattern", "-Werror=uninitialized", "-Werror=return-type"),
)
SANITIZERS = {
    "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
}


class SimtError(Exception):
    """A kernel does not compile, or its run found a fault; the message is the report."""


def unavailable() -> str | None:
    """Why launches cannot run on this machine; None if they can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"fiber.h switches stacks on x86-64 only, not on {platform.machine()}"
    return None


def run(launch: Launch, *, folder: Path = KERNELS, backwards: bool = False, timeout: float = 300) -> None:
    """Run a launch; its tensors (CPU, any dtype and strides) are changed in place.

    A tensor's storage is one buffer of exactly its size, shared by all arguments that view it. folder: where
    program.source lies. backwards: blocks and threads take turns from the last to the first. timeout: seconds.

    Raises:
        SimtError: the source does not compile, or the run found a fault or did not end in time.
    """
    executable = _compile(launch.program, folder)
    storages, image = _encode(launch, backwards)
    with tempfile.TemporaryDirectory(prefix="quantc-simt-") as scratch:
        given, taken = Path(scratch, "given"), Path(scratch, "taken")
        given.write_bytes(image)
        try:
            done = subprocess.run(
                [executable, given, taken],
                env=os.environ | SANITIZERS,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise SimtError(f"{launch.program.entry} did not end within {timeout} s") from None
        if done.returncode != 0:
            raise SimtError(f"{launch.program.entry} failed:\n{_shorten(done.stderr)}")
        _decode(storages, taken.read_bytes())


def _shorten(report: str) -> str:
    """Without AddressSanitizer's picture of the memory around."""
    before, picture, after = report.partition("Shadow bytes around the buggy address:")
    return before + after.partition("ABORTING\n")[2] if picture else report


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _encode(launch: Launch, backwards: bool) -> tuple[list[torch.UntypedStorage], bytes]:
    """The file launch.h reads."""
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    if threads % 32 or not 32 <= threads <= 1024:
        raise SimtError(f"a block of {threads} threads: a multiple of 32 up to 1024 is needed")
    storages: dict[int, torch.UntypedStorage] = {}
    arguments = [word for argument in launch.arguments for word in _words(argument, storages)]
    header = [*launch.grid, *launch.block, launch.shared, backwards, len(storages), len(launch.arguments)]
    sizes = [storage.nbytes() for storage in storages.values()]
    words = [*header, *sizes, *arguments]
    contents = [_bytes_of(storage).numpy().tobytes() for storage in storages.values()]
    return list(storages.values()), struct.pack(f"<{len(words)}q", *words) + b"".join(contents)


def _words(argument: Argument, storages: dict[int, torch.UntypedStorage]) -> tuple[int, int, int]:
    if argument is None:
        return ord("p"), -1, 0
    if isinstance(argument, torch.Tensor):
        storage = argument.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        return ord("p"), list(storages).index(storage._cdata), argument.storage_offset() * argument.element_size()
    if isinstance(argument, int):
        if not -(2**31) <= argument < 2**31:
            raise SimtError(f"{argument} does not fit a 32-bit int")
        return ord("i"), argument, 0
    return ord("f"), struct.unpack("<I", struct.pack("<f", argument))[0], 0


def _decode(storages: list[torch.UntypedStorage], image: bytes) -> None:
    offset = 0
    for storage in storages:
        size = storage.nbytes()
        if size:
            _bytes_of(storage).copy_(torch.frombuffer(bytearray(image[offset : offset + size]), dtype=torch.uint8))
        offset += size


def _compile(program: Program, folder: Path) -> Path:
    """The program's executable."""
    defines = [f"-D{name}={value}" for name, value in program.defines]
    source = [f'-DQUANTC_SOURCE="{(folder / program.source).resolve()}"', f"-DQUANTC_ENTRY={program.entry}"]
    command = [*KERNEL, *defines, *source, str(HERE / "main.cpp"), *map(str, _runtime()), "-o", "program"]
    return _built(program.entry, command, _headers(folder)) / "program"


def _runtime() -> list[Path]:
    sources = sorted(HERE.glob("*.cpp"))
    sources.remove(HERE / "main.cpp")
    objects = _built("runtime", [*RUNTIME, *map(str, sources)], [*sources, *_headers(HERE)])
    return sorted(objects.glob("*.o"))


def _built(name: str, command: list[str], dependencies: list[Path]) -> Path:
    """A folder with what the command writes: one kept in the temporary folder if nothing it depends on changed."""
    key = hashlib.sha256("\0".join([_compiler(), *command]).encode())
    for path in dependencies:
        key.update(str(path).encode() + path.read_bytes())
    cache = Path(tempfile.gettempdir(), f"quantc-simt-{os.getuid()}")
    cache.mkdir(mode=0o700, exist_ok=True)
    built = cache / f"{name}-{key.hexdigest()[:32]}"
    if built.exists():
        return built
    # Written aside and renamed: another process may want the same one now.
    with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as aside:
        made = Path(aside, "made")
        made.mkdir()
        done = subprocess.run(command, cwd=made, capture_output=True, text=True)
        if done.returncode != 0:
            raise SimtError(f"{name} does not compile:\n{done.stderr}")
        try:
            made.rename(built)
        except OSError:  # the other process was first
            if not built.exists():
                raise
    return built


def _headers(folder: Path) -> list[Path]:
    """Whatever a source in the folder may include, and the sources themselves."""
    own = [HERE / "main.cpp", *HERE.glob("*.h"), *(KERNELS / "include").rglob("*.cuh")]
    return sorted({*own, *(path for path in folder.glob("*") if path.suffix in (".cu", ".cuh", ".h"))})


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
