"""What the benchmarks share: commands run and measured in processes of their own, and JSON results.

Run as a script it is the process between a benchmark and the command it measures (see `run_measured`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

QUANTC = [sys.executable, "-c", "from quantc.cli import main; main()"]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass(frozen=True)
class Measured:
    """A whole command: what it printed, and what it cost, start-up included."""

    output: str
    cpu_seconds: float
    wall_seconds: float
    peak_rss_bytes: int


def run_measured(command: list[str], threads: int = 2) -> Measured:
    """Run a command on so many CPU threads; raises RuntimeError when it fails.

    A small process stands in between: on Linux a process is charged its parent's peak memory when it starts,
    and a benchmark may hold a model.
    """
    done = subprocess.run(
        [sys.executable, __file__, *command],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}")
    output, _, costs = done.stdout.rstrip("\n").rpartition("\n")
    return Measured(output, **json.loads(costs))


def quantize(model: str, out: Path, threads: int = 2, **options: Any) -> tuple[Measured, dict[str, Any]]:
    """`quantc quantize` as a command: its costs, and the JSON it prints. An option is `group_size=64`."""
    flags = [part for key, value in options.items() for part in _flag(key, value)]
    command = [*QUANTC, "quantize", model, "--out", str(out), "--force", "--json", "--quiet", *flags]
    measured = run_measured(command, threads)
    return measured, json.loads(measured.output)


def _flag(key: str, value: Any) -> list[str]:
    return [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])


def machine() -> dict[str, str]:
    """Libraries and processor, as `quantc doctor` describes them."""
    from quantc.runtime.doctor import examine_machine

    return examine_machine()


def write_json(file: Path, content: Any) -> None:
    """Write a result; a file half written never stands in for one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    from quantc.files.whole_file import write_whole

    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


def describe(text: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is a module's docstring as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def uniform_at(bits: float, rows: list[dict[str, Any]]) -> float:
    """Return the divergence of uniform quantization at these bits a weight, on straight lines of its logarithm."""
    points = sorted((row["bits_per_weight"], math.log(row["mean_kl"])) for row in rows if row["group_size"])
    sides = [(left, right) for left, right in pairwise(points) if bits <= right[0]] or [(points[-2], points[-1])]
    (low, first), (high, second) = sides[0]
    return math.exp(first + (second - first) * (bits - low) / (high - low))


def _main(command: list[str]) -> int:
    """Run the command, then print its costs as the last line."""
    started = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    wall = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    costs = {
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "wall_seconds": wall,
        "peak_rss_bytes": used.ru_maxrss * RSS_UNIT,
    }
    print("\n" + json.dumps(costs), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
