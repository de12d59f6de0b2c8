"""What an 8-bit embedding and head cost, beside what quantizing the blocks costs.

Each model is quantized once at each width, by `fast` with its embedding and head as they are. Then the KL divergence
from the original is measured twice on the same windows: with these two as they are, and with both rounded to 8 bits as
`--head-bits 8` rounds them. A row's share is what rounding them adds, over the divergence that the blocks cause.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantc
from benchmarks.common import describe, machine, markdown, write_json
from quantc.evaluation.text import read_text
from quantc.evaluation.windows import make_windows
from quantc.frontend import open_model
from quantc.numerics.basis import Basis
from quantc.planning.candidates import best_group_size
from quantc.runtime.modules import unpack
from quantc.spec import QuantSpec

HEAD_BITS = 8
ROWS = 64  # positions whose log-probabilities are held at once


def measure(name: str, path: str, bits: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: both divergences of one model at one width, and the sizes of both files."""
    source = open_model(path)
    original = source.load_whole(torch.float32)
    windows = make_windows(source.tokenizer, read_text(args.text), args.context, limit=args.windows)
    with tempfile.TemporaryDirectory(prefix="head-bits-") as scratch:
        report = quantc.quantize(
            path, out=Path(scratch) / "quantized", bits=bits, preset="fast", head_bits="keep",
            calib=args.calib, samples=args.samples, seq_len=args.context,
        )  # fmt: skip
        model: Any = unpack(quantc.load(report.output, dtype=torch.float32), torch.float32)
    tables = {id(table): table for table in (head(model), model.get_input_embeddings().weight)}.values()
    floats = [table.data for table in tables]
    rounded = [round_table(table) for table in floats]
    divergences: list[list[Tensor]] = [[], []]
    for window in windows:
        expected = predict(original, window.tokens)
        for kept, values in zip(divergences, (floats, rounded), strict=True):
            for table, value in zip(tables, values, strict=True):
                table.data = value
            kept.append(divergence(expected, predict(model, window.tokens)))
    blocks, both = (float(torch.cat(found).double().mean()) for found in divergences)
    saved = sum(source_bytes(report, table) - packed_bytes(table) for table in floats)
    return {
        "model": name,
        "bits": bits,
        "kl_blocks": blocks,
        "kl_with_head": both,
        "share_of_head": both / blocks - 1,
        "positions": sum(len(found) for found in divergences[0]),
        "bits_per_weight": report.bits_per_weight,
        "weights_bytes": report.weights_bytes,
        "weights_bytes_with_head": report.weights_bytes - saved,
        "source_bytes": report.source_bytes,
    }


def head(model: Any) -> nn.Parameter:
    return model.get_output_embeddings().weight


def spec_of(table: Tensor) -> QuantSpec:
    return QuantSpec(HEAD_BITS, best_group_size(table.shape[1]), symmetric=True)


def round_table(table: Tensor) -> Tensor:
    """Return the values of an embedding or a head (V, K) as 8 bits hold them."""
    return Basis.unguided(None, 0, 0).round(table, spec_of(table)).dequantize().to(table.dtype)


def packed_bytes(table: Tensor) -> int:
    return spec_of(table).stored_bits((table.shape[0], table.shape[1])) // 8


def source_bytes(report: quantc.Report, table: Tensor) -> int:
    """Return what the table takes in a checkpoint that keeps it: float16 or bfloat16 in all models measured here."""
    return 2 * table.numel()


@torch.no_grad()
def predict(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, :-1]


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected || found) in nats of logits (T, V), by position, from float32 log-softmax."""
    parts = []
    for start in range(0, len(expected), ROWS):
        wanted, got = (each[start : start + ROWS].float().log_softmax(1) for each in (expected, found))
        parts.append((wanted.exp() * (wanted - got)).sum(1))
    return torch.cat(parts)


def show(rows: list[dict[str, Any]]) -> None:
    print(markdown([
        {
            "model": row["model"],
            "bits": row["bits"],
            "KL, head as it is": f"{row['kl_blocks']:.5f}",
            "KL, head at 8 bits": f"{row['kl_with_head']:.5f}",
            "added": f"{100 * row['share_of_head']:+.2f} %",
            "weights": f"{row['weights_bytes'] / 1e6:.1f} MB",
            "with an 8-bit head": f"{row['weights_bytes_with_head'] / 1e6:.1f} MB",
            "source": f"{row['source_bytes'] / 1e6:.1f} MB",
        }
        for row in rows
    ]))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", nargs=2, required=True, metavar=("NAME", "PATH"), help="PATH as quantc takes it")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=20, help="windows scored")
    parser.add_argument("--context", type=int, default=256, help="tokens in each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/head_bits.json"), help="rows are added")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    content = json.loads(args.out.read_text()) if args.out.exists() else {"machine": machine(), "rows": []}
    settings = {"text": Path(args.text).name, "calibration": Path(args.calib).name}
    settings |= {"samples": args.samples, "windows": args.windows, "context": args.context}
    for bits in args.bits:
        content["rows"].append(measure(*args.model, bits, args) | {"settings": settings})
        write_json(args.out, content)
        show(content["rows"][-1:])


if __name__ == "__main__":
    main()
