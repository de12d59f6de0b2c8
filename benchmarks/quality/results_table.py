"""The table of results: perplexity and divergence of models quantized to several widths by several methods.

Every row is one run by the measuring protocol: the model is quantized by `quantc quantize` in its own
process (asymmetric, calibrated on windows of --calib), loaded, and scored on the first windows of --text in
float32 next to the original. Costs are those of the whole quantize command, on two CPU threads.

Rows are added to --out as they come; a row that is there already is not run again, so an interrupted table is
finished by the same command.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmarks.common import describe, machine, markdown, quantize, write_json
from quantc.evaluation.windows import Window

PRESETS = ("fast", "balanced", "best")
IDENTITY = ("model", "bits", "group_size", "method", "settings")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What besides model, bits, group size and method makes two rows comparable."""
    return {
        "text": args.text.name,
        "calibration": args.calib.name,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "windows": args.windows,
        "context": args.context,
    } | {name: value for name in ("head_bits", "code") if (value := getattr(args, name, None))}


def wanted_rows(args: argparse.Namespace, name: str, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Identities of the rows of one model that are not measured yet."""
    done = [{key: row[key] for key in IDENTITY} for row in known]
    wanted = [
        {
            "model": name,
            "bits": bits,
            "group_size": args.group_size,
            "method": Path(method).stem,
            "settings": settings_of(args),
        }
        for bits, method in product(args.bits, args.methods)
    ]
    return [row for row in wanted if row not in done]


class Scorer:
    """The original of one model, loaded once, and the windows of the text."""

    def __init__(self, path: str, text: Path, args: argparse.Namespace):
        """args: context and windows."""
        import torch

        from quantc.evaluation.text import read_text
        from quantc.evaluation.windows import make_windows
        from quantc.frontend import open_model

        source = open_model(path)
        self.windows: list[Window] = make_windows(
            source.tokenizer, read_text(str(text)), args.context, None, args.windows
        )
        self.original: PreTrainedModel = source.load_whole(torch.float32)

    def score(self, checkpoint: Path) -> dict[str, Any]:
        """Scores of a checkpoint, unpacked to float32 first: the same numbers, several times as fast."""
        import torch

        import quantc
        from quantc.cli.console import SilentProgress
        from quantc.evaluation.scores import score
        from quantc.runtime.modules import unpack

        model: Any = unpack(quantc.load(checkpoint, dtype=torch.float32), torch.float32)
        scores = score(model, self.original, self.windows, SilentProgress())
        return {
            "perplexity": scores.perplexity,
            "perplexity_original": scores.perplexity_original,
            "mean_kl": scores.mean_kl,
            "p99_kl": scores.p99_kl,
            "top1_agreement": scores.top1_agreement,
            "positions": scores.positions,
        }


def measure(row: dict[str, Any], path: str, scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """One row: quantize, load, score."""
    with tempfile.TemporaryDirectory(prefix="results-") as scratch:
        out = Path(scratch) / "quantized"
        method = next(item for item in args.methods if Path(item).stem == row["method"])
        how = "preset" if method in PRESETS else "recipe" if method.endswith(".yaml") else "method"
        options = {"avg_bits" if isinstance(row["bits"], float) else "bits": row["bits"], how: method}
        if row["group_size"] is not None:
            options["group_size"] = row["group_size"]
        if args.head_bits:
            options["head_bits"] = args.head_bits
        if code := row["settings"].get("code"):
            options["code"] = code
        calibration = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len}
        measured, summary = quantize(path, out, asymmetric=True, **options, **calibration)
        return {
            **row,
            "bits_per_weight": summary["bits_per_weight"],
            **scorer.score(out),
            "weights_bytes": summary["weights_bytes"],
            "source_bytes": summary["source_bytes"],
            "cpu_seconds": measured.cpu_seconds,
            "wall_seconds": measured.wall_seconds,
            "peak_rss_bytes": measured.peak_rss_bytes,
            "machine": machine(),
        }


def show(rows: list[dict[str, Any]]) -> None:
    print(markdown([
        {
            "model": row["model"],
            "bits": row["bits"],
            "group": row["settings"].get("code") or row["group_size"] or "auto",
            "method": row["method"],
            "bits/weight": f"{row['bits_per_weight']:.3f}",
            "perplexity": f"{row['perplexity']:.2f}",
            "original": f"{row['perplexity_original']:.2f}",
            "mean KL": f"{row['mean_kl']:.4f}",
            "p99 KL": f"{row['p99_kl']:.3f}",
            "top-1": f"{row['top1_agreement']:.1%}",
            "weights": f"{row['weights_bytes'] / 1e6:.1f} MB",
            "CPU s": f"{row['cpu_seconds']:.0f}",
            "wall s": f"{row['wall_seconds']:.0f}",
            "peak RSS": f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        }
        for row in rows
    ]))  # fmt: skip


def bits(text: str) -> int | float:
    """3 is a code width, 3.25 an average."""
    return float(text) if "." in text else int(text)


def group(text: str) -> int | None:
    return None if text == "auto" else int(text)


def named_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument(
        "--model", type=named_path, action="append", required=True, metavar="NAME=PATH",
        help="a model and the name it has in the table; PATH as `quantc quantize` takes it; may be repeated",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--bits", type=bits, nargs="+", default=[4, 3, 2], help="3.25 is an average")
    parser.add_argument("--methods", nargs="+", default=["rtn", "fast"], help="rtn, presets, recipe files")
    parser.add_argument("--group-size", type=group, default=64, help="auto: as the recipe chooses it")
    parser.add_argument("--code", help="trellis or auto, with --group-size auto [default: grids]")
    parser.add_argument("--head-bits", type=int, help="bits of embedding and head [default: as they are]")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, help="tokens in each [default: the context]")
    parser.add_argument("--windows", type=int, default=40, help="windows scored")
    parser.add_argument("--context", type=int, default=512, help="tokens in each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/table.json"), help="result file")
    args = parser.parse_args()
    args.seq_len = args.seq_len or args.context
    return args


def main() -> None:
    args = parse_arguments()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    for name, path in args.model:
        missing = wanted_rows(args, name, rows)
        scorer = Scorer(path, args.text, args) if missing else None
        for row in missing:
            assert scorer is not None
            rows.append(measure(row, path, scorer, args))
            write_json(args.out, rows)
            show(rows[-1:])
        del scorer
        gc.collect()  # one original at a time
    show(rows)


if __name__ == "__main__":
    main()
