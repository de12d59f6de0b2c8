"""`make fuzz`: so many mutations through every reader, in a process of their own, so that a crash is a case too."""

from __future__ import annotations

import argparse
import faulthandler
import mmap
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from tests.fuzz import corpus
from tests.fuzz.harness import Fuzzer

MOST_FAILURES = 50  # of one run: more of them say nothing new


def main() -> int:
    """Run the cases, print what failed, and return the exit code."""
    options = _parse()
    torch.set_num_threads(1)
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as place:
        os.environ["QUANTC_CACHE"] = os.environ["HF_HOME"] = f"{place}/cache"
        (Path(place) / "scratch").mkdir()
        hf_logging.disable_progress_bar()
        fuzzer = Fuzzer(corpus.make(Path(place) / "corpus"), Path(place) / "scratch")
        if options.case:
            seed, number = map(int, options.case.split(":"))
            failure = fuzzer.run(seed, number)
            print(failure or "passed")
            return 1 if failure else 0
        return _run(fuzzer, options.seed, options.cases, options.minutes)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="stop after so many, whatever is left")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="run this one case again")
    return parser.parse_args()


def _run(fuzzer: Fuzzer, seed: int, cases: int, minutes: float) -> int:
    """Children run the cases; one that dies has its case reported, and the next child goes on behind it."""
    shared = mmap.mmap(-1, 16)  # the case in work, and how many have failed
    deadline = time.monotonic() + 60 * minutes
    start = status = 0
    while start < cases and time.monotonic() < deadline:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _work(fuzzer, seed, range(start, cases), deadline, shared)
        _, status = os.waitpid(child, 0)
        current, failed = _read(shared)
        start = current + 1
        if not os.WIFSIGNALED(status):
            break
        name = signal.Signals(os.WTERMSIG(status)).name
        print(f"case {seed}:{current} killed the process ({name}); run it again: make fuzz CASE={seed}:{current}")
        _write(shared, current, failed + 1)
    done, failed = _read(shared)
    print(f"{done + 1} of {cases} cases, {failed} failures, seed {seed}")
    return 1 if failed or status else 0


def _work(fuzzer: Fuzzer, seed: int, numbers: range, deadline: float, shared: mmap.mmap) -> None:
    """Run cases and leave the process; its exit code is 1 where the harness itself fails, or too much else."""
    code = 0
    try:
        for number in numbers:
            failed = _read(shared)[1]
            _write(shared, number, failed)
            failure = fuzzer.run(seed, number)
            if failure is not None:
                print(failure, flush=True)
                _write(shared, number, failed + 1)
            if failed >= MOST_FAILURES or time.monotonic() > deadline:
                break
        for (reader, outcome), count in sorted(fuzzer.outcomes.items()):
            print(f"{reader:16} {outcome:9} {count}")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _read(shared: mmap.mmap) -> tuple[int, int]:
    return int.from_bytes(shared[:8], "little"), int.from_bytes(shared[8:], "little")


def _write(shared: mmap.mmap, current: int, failed: int) -> None:
    shared[:8], shared[8:] = current.to_bytes(8, "little"), failed.to_bytes(8, "little")


if __name__ == "__main__":
    sys.exit(main())
