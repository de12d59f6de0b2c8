"""Runs numeric tests under each instruction set that this processor has, on one thread and on two.

    python -m tests.levels                 what depends on arithmetic: some minutes for each level and number of threads
    python -m tests.levels PATH ...        these tests instead; what pytest takes

Torch, oneDNN and quantc's own kernels take the best instruction set that they find. Each has a variable that makes it
take a lesser one, so that a processor shows what happens on those of less. Other sums then come in another order, and
a bound that only holds in one of them fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from quantc.kernels.cpu import library

ROOT = Path(__file__).parent.parent
THREADS = (1, 2)
THREADS_VARIABLE = "QUANTC_TEST_THREADS"  # read by tests/conftest.py
NUMERIC = (
    "tests/kernels/cpu",
    "tests/kernels/test_kernels.py",
    "tests/passes",
    "tests/quantc/formats",
    "tests/quantc/numerics",
    "tests/quantc/driver/test_quality.py",
    "tests/quantc/planning/test_budget.py",
    "tests/quantc/sensitivity/test_estimators.py",
    "tests/quantc/runtime/test_half_weights.py",
    "tests/quantc/planning/test_pareto.py",
    "tests/quantc/graph/test_rewrite.py",
    "tests/quantc/runtime/test_modules.py",
    "tests/quantc/sensitivity/test_sensitivity.py",
    "tests/whole/test_quality_targets.py",
    "tests/quantc/numerics/test_sampled_error.py",
    "tests/whole/test_wide_rows.py",
    "tests/test_levels.py::test_the_level_that_was_asked_for_is_in_use",
    "tests/whole/test_perplexity.py",
)


FORCING = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", library.LEVEL_VARIABLE)


@dataclass(frozen=True)
class Level:
    """An instruction set by the names that torch, oneDNN and quantc's kernels have for it."""

    torch: str
    onednn: str
    native: str

    def environment(self, threads: int) -> dict[str, str]:
        """Return the variables that make a process compute so."""
        names = dict(zip(FORCING, (self.torch, self.onednn, self.native), strict=True))
        return {**os.environ, **names, "OMP_NUM_THREADS": f"{threads}", THREADS_VARIABLE: f"{threads}"}


LEVELS = (  # rising; what `make test` runs on is the best of all three, which may be above these
    Level("default", "SSE41", "scalar"),
    Level("avx2", "AVX2", "avx2"),
    Level("avx512", "AVX512_CORE", "avx512"),
)


def best() -> tuple[str, list[str]]:
    """Return torch's capability in lower case and the levels of quantc's kernels, none where these were not built."""
    native = [] if isinstance(library.load(), str) else library.levels()
    return torch.backends.cpu.get_cpu_capability().lower(), native


def missing(level: Level, capability: str, native: list[str]) -> str:
    """Return why a level cannot be run where torch and the kernels have these at best, "" where it can.

    Torch takes a level above the processor's at its word, and dies of an illegal instruction.
    """
    names = [item.torch for item in LEVELS]
    if capability not in names[names.index(level.torch) :] and level.torch != "default":
        return f"torch has {capability} at best here"
    if native and level.native not in native:
        return f"quantc's kernels have {', '.join(native)} here"
    return ""


def run(level: Level, threads: int, tests: list[str]) -> bool:
    """Run pytest under a level; return whether all passed."""
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *tests]
    return subprocess.run(command, env=level.environment(threads), cwd=ROOT).returncode == 0


def main() -> int:
    tests = sys.argv[1:] or list(NUMERIC)
    failed: list[str] = []
    here = best()
    for level in LEVELS:
        if reason := missing(level, *here):
            print(f"skipped {level.torch}: {reason}", flush=True)
            continue
        for threads in THREADS:
            name = f"{level.torch} on {threads} thread{'s' if threads > 1 else ''}"
            print(f"--- {name}", flush=True)
            failed += [] if run(level, threads, tests) else [name]
    print(f"failed: {', '.join(failed)}" if failed else "all levels pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
