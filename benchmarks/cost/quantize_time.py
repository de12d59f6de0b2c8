"""CPU seconds of `quantc quantize` with GPTQ, next to the bare forward passes on the same calibration tokens.

Both run in processes of their own, one after the other, on the same number of threads. The forward passes are
those of the decoder blocks in float32, without the head: the least that any calibrated method has to compute.
Their seconds are of the passes alone; the command's are of the whole command, start-up and writing included.
Single times mean little on a shared machine, so the ratio is printed with them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import describe, machine, markdown, quantize, run_measured, write_json

BATCH_TOKENS = 2048  # as the calibration of quantc runs them


def run_forward(path: str, calib: str, samples: int, seq_len: int) -> dict[str, float]:
    """CPU and wall seconds of the decoder blocks on the calibration tokens, in this process."""
    import torch

    from quantc.calib_data import load_documents
    from quantc.calibration.tokens import tokenize_documents
    from quantc.frontend import open_model

    source = open_model(path)
    tokens = tokenize_documents(source.tokenizer, load_documents(calib), samples, seq_len, seed=0)
    decoder = source.load_whole(torch.float32).base_model
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.no_grad():
        for batch in tokens.split(max(1, BATCH_TOKENS // seq_len)):
            decoder(input_ids=batch, use_cache=False)
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def measure(args: argparse.Namespace, samples: int) -> dict[str, Any]:
    """One row: the forward passes, then the command, on so many windows."""
    amount = [str(samples), str(args.seq_len)]
    child = [sys.executable, "-m", "benchmarks.cost.quantize_time", "--forward", args.model, args.calib, *amount]
    forward = json.loads(run_measured(child, args.threads).output.splitlines()[-1])
    with tempfile.TemporaryDirectory(prefix="quantize-time-") as scratch:
        options = {"bits": args.bits, "group_size": args.group_size, "calib": args.calib, "method": "gptq"}
        measured, _ = quantize(
            args.model,
            Path(scratch) / "out",
            threads=args.threads,
            samples=samples,
            seq_len=args.seq_len,
            **options,
        )
    costs = {key: value for key, value in asdict(measured).items() if key != "output"}
    ratio = measured.cpu_seconds / forward["cpu_seconds"]
    return {
        "samples": samples,
        "seq_len": args.seq_len,
        "forward": forward,
        "quantize": costs,
        "cpu_ratio": ratio,
    }


def show(rows: list[dict[str, Any]]) -> None:
    print(markdown([
        {
            "tokens": f"{row['samples']} x {row['seq_len']}",
            "forward passes, CPU s": f"{row['forward']['cpu_seconds']:.1f}",
            "quantize, CPU s": f"{row['quantize']['cpu_seconds']:.1f}",
            "ratio": f"{row['cpu_ratio']:.2f}",
            "quantize, wall s": f"{row['quantize']['wall_seconds']:.1f}",
            "peak RSS": f"{row['quantize']['peak_rss_bytes'] / 1e9:.2f} GB",
        }
        for row in rows
    ]))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("model", help="as `quantc quantize` takes it")
    parser.add_argument("--calib", default="builtin", help="calibration text, likewise")
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64], help="numbers of windows to measure")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = [measure(args, samples) for samples in args.samples]
    show(rows)
    if args.out:
        settings = {"model": Path(args.model).name, "calibration": Path(args.calib).name}
        settings |= {"bits": args.bits, "group_size": args.group_size, "threads": args.threads}
        write_json(args.out, {**settings, "rows": rows, "machine": machine()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--forward"]:  # the process of its own
        path, calib, samples, seq_len = sys.argv[2:]
        print(json.dumps(run_forward(path, calib, int(samples), int(seq_len))))
    else:
        main()
