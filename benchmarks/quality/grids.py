"""Every grid: bits, error on Gaussian weights, error on a model's linears and KL divergence, both ways of rounding.

A model is quantized to one format everywhere (`--formats`), to nearest and by GPTQ, embedding and head as they are. The
error is the share of the output's energy that rounding takes (tr(D G D^T) / tr(W G W^T)), the mean over linears whose
rows blocks of 256 divide: the same ones for all grids. A divergence is measured where every linear has the format.

Rows are added to --out as they come; a row that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

import quantc
from benchmarks.common import describe, machine, markdown, write_json
from benchmarks.quality.results_table import Scorer
from quantc.kernels.rounding import panel_for
from quantc.numerics.basis import Basis
from quantc.spec import GRIDS, Fixed, QuantSpec, Trellis, spec_of_label

UNIFORM = ("w2g64", "w3g64", "w4g64", "w4g64sym", "w4g128", "w5g64", "w6g64", "w8g64")
TRELLIS = tuple(f"{Trellis.name}{bits}" for bits in range(1, Trellis.most_bits + 1))
LABELS = (*UNIFORM, *TRELLIS, *(name for name, grid in GRIDS.items() if issubclass(grid, Fixed)))
WIDTH = 4096  # of the matrix that bits are counted for
LARGE_BLOCK = 256
IDENTITY = ("model", "grid", "method", "settings")


def spec_of(label: str) -> QuantSpec:
    spec = spec_of_label(label)
    assert spec is not None
    return spec


def on_gaussian(label: str) -> dict[str, Any]:
    """Return bits per weight, and the squared error of normal weights rounded to nearest over their squares."""
    spec = spec_of(label)
    weight = torch.randn(512, WIDTH, generator=torch.Generator().manual_seed(0))
    basis = Basis.unguided(None, 0, 0, panel_for(weight.device))
    lost = basis.round(weight, spec).dequantize() - weight
    return {
        "grid": spec.label(),
        "bits_per_weight": spec.bits_per_weight((WIDTH, WIDTH)),
        "error": float(lost.square().sum() / weight.square().sum()),
    }


def on_model(row: dict[str, Any], path: str, scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: a model quantized to one format by one method."""
    with tempfile.TemporaryDirectory(prefix="grids-") as scratch:
        out = Path(scratch) / "quantized"
        report = quantc.quantize(
            path, formats=[row["grid"]], method=row["method"], out=out, head_bits="keep",
            calib=str(args.calib), samples=args.samples, seq_len=args.seq_len,
        )  # fmt: skip
        shared = [linear.error for linear in report.linears if linear.shape[1] % LARGE_BLOCK == 0]
        found = {"error": sum(shared) / len(shared), "linears": len(shared), "bits_per_weight": report.bits_per_weight}
        whole = not any("kept as floats" in note for note in report.notes)
        return {**row, **found, **(scorer.score(out) if whole else {})}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    names = {"text": args.text.name, "calibration": args.calib.name}
    return names | {name: getattr(args, name) for name in ("samples", "seq_len", "windows", "context")}


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", nargs=2, required=True, metavar=("NAME", "SOURCE"), help="SOURCE as quantc takes it")
    parser.add_argument("--grids", nargs="+", default=LABELS, metavar="LABEL", help="formats [default: all]")
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in each")
    parser.add_argument("--windows", type=int, default=20, help="windows scored")
    parser.add_argument("--context", type=int, default=256, help="tokens in each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grids.json"), help="rows are added")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    content = json.loads(args.out.read_text()) if args.out.exists() else {"machine": machine(), "rows": []}
    content["gaussian"] = [on_gaussian(label) for label in LABELS]
    name, path = args.model
    labels = [spec_of(label).label() for label in args.grids]
    done = [{key: row[key] for key in IDENTITY} for row in content["rows"]]
    scorer = Scorer(path, args.text, args)
    for label, method in product(labels, ("rtn", "gptq")):
        row = {"model": name, "grid": label, "method": method, "settings": settings_of(args)}
        if row not in done:
            content["rows"].append(on_model(row, path, scorer, args))
            write_json(args.out, content)
            shown = {key: content["rows"][-1].get(key) for key in ("grid", "method", "error", "mean_kl")}
            print(markdown([{key: f"{v:.5f}" if isinstance(v, float) else str(v) for key, v in shown.items()}]))


if __name__ == "__main__":
    main()
