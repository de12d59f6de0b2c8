"""Every program of the catalogue compiles for every architecture, within its budget. No GPU is needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from quantc.kernels.cuda import build
from quantc.kernels.cuda.build import Resources, compile_program
from quantc.kernels.cuda.catalogue import LAUNCHERS, programs
from quantc.kernels.cuda.program import Budget, Program
from tests.kernels.cuda.needs import needs_nvrtc

PROGRAMS = programs()
ROOT = Path(__file__).parents[3]


def over_budget(found: Resources | None, budget: Budget) -> list[str]:
    """What a program takes too much of."""
    assert found is not None, "NVRTC's log is not understood"
    limits = {
        "registers": (found.registers, budget.registers),
        "bytes of static shared memory": (found.static_shared_bytes, budget.shared_bytes),
        "bytes of spill stores": (found.spill_stores, 0),
        "bytes of spill loads": (found.spill_loads, 0),
    }
    return [f"{taken} {what}, at most {limit}" for what, (taken, limit) in limits.items() if taken > limit]


def label(value: object) -> str:
    if not isinstance(value, Program):
        return str(value)
    return "-".join([value.source, value.entry, *(f"{name}={text}" for name, text in value.defines)])


def cases(architectures: tuple[int, ...], everyday: bool) -> list[tuple[Program, int]]:
    """Programs with the architectures they are made for."""
    return [
        (program, arch)
        for program, budget in PROGRAMS.items()
        for arch in architectures
        if arch >= budget.minimum_arch and (budget.everyday or not everyday)
    ]


def check(program: Program, arch: int) -> None:
    made = compile_program(program, f"sm_{arch}")
    assert over_budget(made.resources, PROGRAMS[program]) == []


@needs_nvrtc
@pytest.mark.parametrize(("program", "arch"), cases((80, 90), everyday=True), ids=label)
def test_a_program_keeps_within_its_budget(program: Program, arch: int) -> None:
    check(program, arch)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(("program", "arch"), cases((75, 80, 86, 89, 90, 100, 120), everyday=False), ids=label)
def test_every_program_keeps_within_its_budget_on_every_architecture(program: Program, arch: int) -> None:
    check(program, arch)


def test_no_program_is_listed_twice() -> None:
    listed = [program for variants in LAUNCHERS for program in variants()]
    assert len(listed) == len(set(listed))


def test_every_source_is_in_the_catalogue_and_every_entry_among_the_fast_tests() -> None:
    written = {path.name for path in build.FOLDER.glob("*.cu")}
    assert {program.source for program in PROGRAMS} == written
    entries = {(program.source, program.entry) for program in PROGRAMS}
    assert entries == {(program.source, program.entry) for program, budget in PROGRAMS.items() if budget.everyday}


def test_no_source_includes_a_header_that_is_not_here() -> None:
    headers = {path.name for path in (build.FOLDER / "include").glob("*.cuh")}
    for path in [*build.FOLDER.glob("*.cu"), *(build.FOLDER / "include").glob("*.cuh")]:
        included = set(re.findall(r'^\s*#include\s*["<]([^">]+)', path.read_text(), re.MULTILINE))
        assert included <= headers | {"host.h"}, path.name


def test_what_exceeds_a_budget_is_named() -> None:
    budget = Budget(registers=64, shared_bytes=0)
    assert over_budget(Resources(64, 0, 0, 8, 0), budget) == []
    assert over_budget(Resources(65, 4, 8, 8, 16), budget) == [
        "65 registers, at most 64",
        "16 bytes of static shared memory, at most 0",
        "4 bytes of spill stores, at most 0",
        "8 bytes of spill loads, at most 0",
    ]


def test_every_source_is_packaged() -> None:
    """setup.py names the folders whose .cu and .cuh files travel in the wheel."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (data,) = (k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == "package_data")
    kernels = ROOT / "kernels"
    packaged = {path for pattern in ast.literal_eval(data)["quantc.kernels"] for path in kernels.glob(pattern)}
    sources = {path for path in kernels.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp")}
    assert sources
    assert sources <= packaged
