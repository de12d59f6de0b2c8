"""The library under AddressSanitizer and UndefinedBehaviorSanitizer: as a program of its own, and below Python."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from unittest import mock

import pytest

from .cases import LEVELS, built

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Unoptimized, every one of the unrolled steps would be a function call with its own checks: -O1 compiles faster too.
CHEAP = ["-O1", "-g1"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def build_settings() -> dict[str, object]:
    """The names that setup.py defines, without running a setup."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


def runs_here(stem: str) -> bool:
    """Whether a file's code can run on this processor: with sanitizers those for AVX-512 compile for half an hour."""
    level = {"avx2_vnni": "avx2_vnni"}.get(stem, "avx512" if stem.startswith("avx512") else None)
    return level is None or level in LEVELS


def build(folder: Path) -> tuple[Path, Path]:
    """The program, and the library alone under the name that Python looks for."""
    settings = build_settings()
    flags: list[str] = [flag for flag in settings["NATIVE_FLAGS"] if flag != "-O3"]  # type: ignore[attr-defined]
    own: dict[str, list[str]] = settings["OWN_FLAGS"] if settings["IS_X86_64"] else {}  # type: ignore[assignment]
    native = ROOT / settings["NATIVE"]  # type: ignore[operator]

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        checks = [*CHEAP, *SANITIZE] if runs_here(source.stem) else ["-O0"]
        command = [compiler(), *flags, *checks, *own.get(source.stem, []), f"-I{native}", "-c"]
        subprocess.run([*command, str(source), "-o", out], check=True, capture_output=True, text=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        main, *objects = pool.map(compile_one, [HERE / "sanitized.cpp", *sorted(native.glob("*.cpp"))])
    program, shared = folder / "sanitized", folder / f"_native{EXTENSION_SUFFIXES[0]}"
    link = [compiler(), *SANITIZE, *objects, "-ldl", "-pthread"]
    subprocess.run([*link, main, "-o", str(program)], check=True)
    subprocess.run([*link, "-shared", "-o", str(shared)], check=True)
    return program, shared


def sanitizers_work(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [compiler(), *SANITIZE, str(source), "-o", str(folder / "empty")]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run([folder / "empty"], check=False).returncode == 0


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program and the library, both with sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    if not sanitizers_work(folder):
        pytest.skip("the compiler's sanitizers do not work here")
    return build(folder)


def environment(leaks: bool = True, preload: Sequence[str] = ()) -> dict[str, str]:
    """What does not fit into memory fails as it does without a sanitizer. leaks: Python and torch leave much behind."""
    options = f"allocator_may_return_null=1:detect_leaks={int(leaks)}"
    return {**os.environ, "ASAN_OPTIONS": options, "LD_PRELOAD": " ".join(preload)}


@built
@pytest.mark.slow
def test_no_level_leaves_its_memory_or_defined_behaviour(sanitized: tuple[Path, Path]) -> None:
    done = subprocess.run([sanitized[0]], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == LEVELS


# What Python hands over: wrong shapes and parts, steps as torch calls them, too little memory.
SELECTION = [
    *("tests/kernels/test_checks.py", "tests/quantc/runtime/test_packed_parts.py"),
    *("tests/kernels/cpu/test_steps.py", "tests/kernels/cpu/test_failures.py"),
]
RUN = """
import sys
from pathlib import Path
import pytest
from quantc.kernels.cpu import library
library.FOLDER = Path(sys.argv[1])
assert isinstance(library.load(), library.Library), library.load()
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@built
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="libraries are put before others by LD_PRELOAD")
def test_python_hands_over_nothing_that_a_sanitizer_objects_to(sanitized: tuple[Path, Path]) -> None:
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last one must be there when asan looks for its throw
    files = [
        subprocess.check_output([str(compiler()), f"-print-file-name={name}"], text=True).strip() for name in names
    ]
    if not all(Path(file).is_absolute() for file in files):
        pytest.skip("the compiler's sanitizers are no shared libraries here")
    command = [sys.executable, "-c", RUN, str(sanitized[1].parent), *SELECTION]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(leaks=False, preload=files), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
