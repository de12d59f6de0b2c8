"""How well losses are predicted: every estimator against the measured KL divergence of single changes.

A model is planned as `balanced` plans it (asymmetric, rotated), at each of the widths. In every N-th block each linear
is rounded alone, guided by calibration text, and the KL divergence on other text is measured (estimator kl, float32).
fisher and gram predict the same from the calibration text, for the whole model, which is what their CPU seconds are
for; kl's are for the linears that were measured.

Figures: the rank correlation (Spearman) of predicted and measured losses, the ratio of their sums, and the standard
deviation of log(predicted / measured), which no factor common to all linears changes. gram's losses have no unit, so
it has no ratio.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import describe, machine, markdown, write_json
from quantc.calib_data import load_documents
from quantc.calibration.tokens import tokenize_documents
from quantc.frontend import open_model, to_meta
from quantc.graph.derive import derive
from quantc.graph.model_graph import Linear
from quantc.pipeline.run import Run
from quantc.plan import Plan
from quantc.progress import LogProgress
from quantc.recipe import preset
from quantc.report import Report
from quantc.sensitivity import Estimator, Losses, kl, measure
from quantc.spec import QuantSpec

PREDICTING: tuple[Estimator, ...] = ("fisher", "gram")


def planned_run(args: argparse.Namespace) -> Run:
    """The model as `quantc quantize --preset balanced --asymmetric` plans it, before anything is rounded."""
    recipe = preset("balanced").with_settings(allocate={"group_size": args.group_size, "symmetric": False})
    passes = recipe.build_passes()
    rounding = next(item.rounding for item in passes if item.rounding)
    source = open_model(args.model)
    graph = derive(source.model, source.load, to_meta)
    run = Run(source, graph, Plan(), Report(source.name, ""), LogProgress(), rounding=rounding)
    for item in passes:
        item.plan(run)
    return run


def windows(run: Run, text: Path, samples: int, seq_len: int) -> torch.Tensor:
    """int64 (samples, seq_len), spread over a text."""
    return tokenize_documents(run.source.tokenizer, load_documents(str(text)), samples, seq_len, seed=0)


def estimate(estimator: Estimator, args: argparse.Namespace) -> tuple[Losses, float]:
    """Losses of a model's linears, for kl of those in every N-th block, and the CPU seconds they took."""
    run = planned_run(args)  # one for each estimator: afterwards parts of the model are gone from memory
    tokens = windows(run, args.calib, args.samples, args.seq_len)
    measured = list(run.graph.linears)
    if estimator == "kl":  # which measures on the first samples; the others guide the rounding
        tokens = torch.cat([windows(run, args.text, kl.SAMPLES, args.seq_len), tokens])
        measured = [linear.name for block in run.graph.blocks[:: args.every] for linear in block.quantized]

    def candidates(linear: Linear) -> list[QuantSpec]:
        spec = run.plan.specs[linear.name]
        assert spec is not None
        return [replace(spec, bits=bits) for bits in args.bits] if linear.name in measured else []

    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="sensitivity-") as folder:
        found = measure(estimator, run, tokens, Path(folder), candidates)
    return found, time.process_time() - started


def at_width(losses: Losses, names: list[str], bits: int) -> np.ndarray:
    """float64 (linears,): the losses of these linears in so many bits."""
    return np.array([next(item.loss for item in losses[name] if item.spec.bits == bits) for name in names])


def compare(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """The figures of one estimator at one width; losses (linears,) each."""
    return {
        "rank_correlation": float(spearmanr(predicted, measured).statistic),
        "sum_ratio": float(predicted.sum() / measured.sum()),
        "spread": float(np.log(predicted / measured).std()),
    }


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each width and estimator, with the losses of every linear that was measured."""
    truth, spent = estimate("kl", args)
    known = {estimator: estimate(estimator, args) for estimator in PREDICTING}
    names, rows = list(truth), []
    for bits, (estimator, (losses, seconds)) in product(args.bits, known.items()):
        predicted, measured = at_width(losses, names, bits), at_width(truth, names, bits)
        rows.append({
            "bits": bits,
            "estimator": estimator,
            **compare(predicted, measured),
            "cpu_seconds": seconds,
            "cpu_seconds_of_kl": spent,
            "predicted": dict(zip(names, predicted.tolist(), strict=True)),
            "measured": dict(zip(names, measured.tolist(), strict=True)),
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(markdown([
        {
            "bits": row["bits"],
            "estimator": row["estimator"],
            "linears": len(row["measured"]),
            "rank correlation": f"{row['rank_correlation']:.3f}",
            "predicted / measured": "-" if row["estimator"] == "gram" else f"{row['sum_ratio']:.2f}",
            "spread": f"{row['spread']:.2f}",
            "CPU s": f"{row['cpu_seconds']:.1f}",
            "CPU s of kl": f"{row['cpu_seconds_of_kl']:.1f}",
        }
        for row in rows
    ]))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", required=True, help="as `quantc quantize` takes it")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--bits", type=int, nargs="+", default=[3], help="widths that linears are rounded to")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--every", type=int, default=4, help="measure the linears of every N-th block")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window, of both texts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity.json"), help="result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = rows_of(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("model", "text", "calib", "out")}
    settings |= {"model": Path(args.model).name, "text": args.text.name, "calibration": args.calib.name}
    write_json(args.out, {**settings, "machine": machine(), "rows": rows})
    show(rows)


if __name__ == "__main__":
    main()
