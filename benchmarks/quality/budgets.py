"""Mixed precision against the same width everywhere: KL divergence at equal bits, as a table and a plot.

Every average of --averages is built by `quantc quantize --avg-bits`, and the same preset at whole widths in groups of
64 (and 2 bits in groups of 128, below the smallest of these) says what uniform quantization takes. Between two uniform
points the logarithm of the divergence is taken as a straight line of the bits, everything stored counted.

Rows are measured as results_table does, and added to --out as they come; rows that are there already are not run
again. A row that results_table has made is one of these too: copy it into --out to save its time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import describe, markdown, uniform_at, write_json
from benchmarks.quality.results_table import IDENTITY, Scorer, measure, named_path, settings_of

AVERAGES = (2.25, 2.5, 3.0, 3.25, 3.5, 4.0)
UNIFORM = ((2, 128), (2, 64), (3, 64), (4, 64))  # bits, group size

Row = dict[str, Any]


def wanted(args: argparse.Namespace, name: str) -> list[Row]:
    """Identities of the rows of one model: uniform ones, then averages."""
    formats = [*UNIFORM, *((float(average), None) for average in args.averages)]
    same = {"model": name, "method": args.preset, "settings": settings_of(args)}
    return [{**same, "bits": bits, "group_size": group} for bits, group in formats]


def table(rows: list[Row]) -> str:
    """The averages of one model."""
    shown = []
    for row in sorted(rows, key=lambda row: row["bits_per_weight"]):
        if row["group_size"] is None:
            uniform = uniform_at(row["bits_per_weight"], rows)
            shown.append({
                "average": f"{row['bits']:g}",
                "bits/weight": f"{row['bits_per_weight']:.3f}",
                "KL": f"{row['mean_kl']:.4f}",
                "uniform at these bits": f"{uniform:.4f}",
                "of uniform": f"{row['mean_kl'] / uniform:.2f}",
                "perplexity": f"{row['perplexity']:.2f}",
                "weights file": f"{row['weights_bytes'] / 1e6:.1f} MB",
                "CPU s": f"{row['cpu_seconds']:.0f}",
            })  # fmt: skip
    return markdown(shown)


def plot(rows: list[Row], file: Path) -> None:
    """A panel for each model: divergence over bits a weight, mixed and uniform."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * len(models), 4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for label, uniform, style in (("uniform", True, "o--"), ("mixed", False, "o-")):
            points = sorted(
                (row["bits_per_weight"], row["mean_kl"])
                for row in rows
                if row["model"] == model and (row["group_size"] is not None) == uniform
            )
            axes.plot(*zip(*points, strict=True), style, label=label, color="#7a818a" if uniform else "#2f6fb3")
        axes.set(
            title=model, xlabel="bits a weight inside the blocks, all counted", ylabel="KL divergence", yscale="log"
        )
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--model", type=named_path, action="append", required=True, metavar="NAME=PATH",
        help="a model and the name it has in the table; PATH as `quantc quantize` takes it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--averages", type=float, nargs="+", default=AVERAGES, help="bits a weight")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=40, help="windows scored")
    parser.add_argument("--context", type=int, default=512, help="tokens in each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budgets.json"), help="result file")
    parser.add_argument("--plot", type=Path, help="where to draw the plot, a PNG or SVG file")
    args = parser.parse_args()
    args.seq_len, args.head_bits, args.methods = args.context, None, [args.preset]
    return args


def main() -> None:
    args = parse_arguments()
    rows: list[Row] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for name, path in args.model:
        done = [{key: row[key] for key in IDENTITY} for row in rows]
        missing = [row for row in wanted(args, name) if row not in done]
        scorer = Scorer(path, args.text, args) if missing else None
        for row in missing:
            assert scorer is not None
            rows.append(measure(row, path, scorer, args))
            write_json(args.out, rows)
            print(f"{name} {row['bits']} {row['group_size'] or 'mixed'}: KL {rows[-1]['mean_kl']:.4f}", flush=True)
        print(f"\n{name}, `{args.preset}`\n\n{table([row for row in rows if row['model'] == name])}\n")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
