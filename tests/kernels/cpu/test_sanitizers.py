"""The library under AddressSanitizer and UndefinedBehaviorSanitizer, as a program of its own."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
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


def build(folder: Path) -> Path:
    settings = build_settings()
    flags: list[str] = [flag for flag in settings["NATIVE_FLAGS"] if flag != "-O3"]  # type: ignore[attr-defined]
    own: dict[str, list[str]] = settings["OWN_FLAGS"] if settings["IS_X86_64"] else {}  # type: ignore[assignment]
    native = ROOT / settings["NATIVE"]  # type: ignore[operator]

    def compile_one(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        command = [compiler(), *flags, *CHEAP, *SANITIZE, *own.get(source.stem, []), f"-I{native}", "-c"]
        subprocess.run([*command, str(source), "-o", out], check=True, capture_output=True, text=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [HERE / "sanitized.cpp", *sorted(native.glob("*.cpp"))]))
    program = folder / "sanitized"
    subprocess.run([compiler(), *SANITIZE, *objects, "-ldl", "-pthread", "-o", str(program)], check=True)
    return program


def sanitizers_work(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [compiler(), *SANITIZE, str(source), "-o", str(folder / "empty")]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run([folder / "empty"], check=False).returncode == 0


@built
@pytest.mark.slow
def test_no_level_leaves_its_memory_or_defined_behaviour(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("there is no C++ compiler")
    if not sanitizers_work(tmp_path):
        pytest.skip("the compiler's sanitizers do not work here")
    done = subprocess.run([build(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == LEVELS
