"""GGUF files by AutoRound and by quantc, of the same size, measured by llama.cpp; CPU seconds of whole commands.

    python -m benchmarks.quality.autoround_gguf demo:smollm2 --python OTHER/bin/python --text FILE --calib FILE

AutoRound (Cheng et al. 2023, arXiv:2309.05516; package auto-round) trains for these block types. It runs in a Python of
its own, --python, on the same calibration windows, with its defaults but for the number of steps a block. quantc then
gets the bytes of its file as --size.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Measured, describe, machine, markdown, quantize, run_measured, write_json
from benchmarks.quality.autoround import save_original, save_windows
from benchmarks.quality.gguf import Scorer

# Runs where auto-round is installed, without quantc.
AUTOROUND = """
import sys
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, windows, scheme, steps, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
dataset = torch.load(windows)
rounder = AutoRound(
    model, tokenizer, scheme=scheme, iters=int(steps), nsamples=len(dataset), seqlen=dataset[0].shape[-1],
    dataset=dataset, device_map="cpu",
)
rounder.quantize_and_save(out, format=scheme)
"""


def run_autoround(args: argparse.Namespace, scratch: Path, scheme: str, steps: int) -> tuple[Measured, Path]:
    """Return what it cost, and the file."""
    out = scratch / f"{scheme.replace(':', '-')}-{steps}"
    settings = [scratch / "original", scratch / "windows.pt", scheme, steps, out]
    measured = run_measured([args.python, "-c", AUTOROUND, *map(str, settings)], args.threads)
    (file,) = out.rglob("*.gguf")
    return measured, file


def row_of(tool: str, scheme: str, measured: Measured, scores: dict[str, Any]) -> dict[str, Any]:
    costs = {"cpu_seconds": measured.cpu_seconds, "peak_rss_bytes": measured.peak_rss_bytes}
    return {"tool": tool, "type": scheme, **scores, **costs}


def compare(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Return rows: AutoRound's file and quantc's, for every type and number of steps."""
    save_original(args.model, scratch / "original")
    save_windows(args, scratch / "windows.pt")
    scorer, rows = Scorer(args.model, args, scratch / "logits"), list[dict[str, Any]]()
    calibration = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len}
    for scheme in args.types:
        limit = 0
        for steps in args.steps:
            measured, file = run_autoround(args, scratch, scheme, steps)
            limit = file.stat().st_size
            rows.append(row_of(f"AutoRound, {steps} steps", scheme, measured, scorer(file)))
            print(rows[-1], flush=True)
        for preset in args.presets:
            ours = scratch / f"{preset}.gguf"
            measured, _ = quantize(args.model, ours, args.threads, size=limit, preset=preset, **calibration)
            rows.append(row_of(f"quantc, {preset}", scheme, measured, scorer(ours)))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = describe(__doc__)
    parser.add_argument("model")
    parser.add_argument("--python", required=True, help="a Python that has auto-round")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--types", nargs="+", default=["gguf:q4_k_s", "gguf:q2_k_s"])
    parser.add_argument("--steps", nargs="+", type=int, default=[50])
    parser.add_argument("--presets", nargs="+", default=["fast"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/autoround_gguf.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autoround-") as scratch:
        rows = compare(args, Path(scratch))
    write_json(args.out, {"machine": machine(), "settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows})
    shown = ("tool", "type", "bytes", "kl", "perplexity", "cpu_seconds")
    print(markdown([{key: str(row[key]) for key in shown} for row in rows]))


if __name__ == "__main__":
    main()
