"""Targets of quality: what `--max-kl` builds, against the KL divergence of its result on text that it has not seen.

`quantc quantize --max-kl` measures on part of the calibration text; --text is another. Met is a target where the
divergence there is at most 1.1 times it, and bits are not wasted where it is at least 0.7 times it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import quantc
from benchmarks.common import describe, machine, markdown, quantize, write_json
from benchmarks.quality.results_table import named_path


def measure(name: str, path: str, target: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row: a build, and its score."""
    with tempfile.TemporaryDirectory(prefix="targets-") as scratch:
        out = Path(scratch) / "quantized"
        measured, summary = quantize(
            path, out, max_kl=target, preset=args.preset, asymmetric=True,
            calib=args.calib, samples=args.samples, seq_len=args.context,
        )  # fmt: skip
        found = quantc.evaluate(out, text=args.text, against=path, context=args.context, windows=args.windows)
    return {
        "model": name,
        "target": target,
        "mean_kl": found.mean_kl,
        "bits_per_weight": summary["bits_per_weight"],
        "cpu_seconds": measured.cpu_seconds,
        "notes": summary["notes"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(markdown([
        {
            "model": row["model"],
            "--max-kl": row["target"],
            "KL": f"{row['mean_kl']:.4f}",
            "of the target": f"{row['mean_kl'] / row['target']:.2f}",
            "bits/weight": f"{row['bits_per_weight']:.3f}",
            "CPU s": f"{row['cpu_seconds']:.0f}",
        }
        for row in rows
    ]))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--model", type=named_path, action="append", required=True, metavar="NAME=PATH",
        help="a model and the name it has in the table; PATH as `quantc quantize` takes it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--max-kl", type=float, nargs="+", default=[0.05, 0.15, 0.5], help="targets")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=20, help="windows scored")
    parser.add_argument("--context", type=int, default=512, help="tokens in each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/targets.json"), help="result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = []
    for name, path in args.model:
        for target in args.max_kl:
            rows.append(measure(name, path, target, args))
            show(rows[-1:])
    show(rows)
    settings = {"preset": args.preset, "text": Path(args.text).name, "calibration": Path(args.calib).name}
    write_json(args.out, {**settings, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
