"""Each instruction set that this processor has is really in use, and the quickest numeric tests pass on it."""

from __future__ import annotations

import os

import pytest
import torch

from quantc.kernels.cpu import library
from tests.helpers import thinned
from tests.levels import LEVELS, THREADS_VARIABLE, Level, best, missing, run

IN_USE = "tests/test_levels.py::test_the_level_that_was_asked_for_is_in_use"
RESIDUAL, ROUNDING = (f"tests/quantc/numerics/test_{name}.py" for name in ("residual", "rounding"))
QUICKEST = [IN_USE, RESIDUAL, f"{ROUNDING}::test_gptq_is_the_textbook_algorithm_at_any_width"]


@pytest.mark.parametrize("tests", thinned([QUICKEST, [ROUNDING]], every=2), ids=["quickest", "rounding"])
@pytest.mark.parametrize("level", LEVELS, ids=[level.torch for level in LEVELS])
def test_quick_numeric_tests_pass_on_every_level(level: Level, tests: list[str]) -> None:
    """On two threads, as the other tests run on one."""
    if reason := missing(level, *best()):
        pytest.skip(reason)
    assert run(level, 2, tests)


def test_the_level_that_was_asked_for_is_in_use() -> None:
    capability, _ = best()
    assert capability == os.environ.get("ATEN_CPU_CAPABILITY", capability)
    assert torch.get_num_threads() == int(os.environ.get(THREADS_VARIABLE, "1"))
    if not isinstance(library.load(), str):
        assert library.level() == os.environ.get(library.LEVEL_VARIABLE, library.levels()[-1])


def test_a_level_is_left_out_where_torch_or_the_kernels_lack_it() -> None:
    default, avx2, avx512 = LEVELS
    assert missing(avx512, "avx2", ["scalar", "avx2"]) == "torch has avx2 at best here"
    assert missing(avx512, "avx512", ["scalar", "avx2"]) == "quantc's kernels have scalar, avx2 here"
    assert missing(avx2, "default", ["scalar"]) == "torch has default at best here"
    assert [missing(level, "avx512", []) for level in LEVELS] == ["", "", ""]  # kernels that were not built
    assert missing(default, "zvector", ["scalar"]) == missing(avx2, "avx2", ["scalar", "avx2"]) == ""
