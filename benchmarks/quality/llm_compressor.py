"""GPTQ by llm-compressor against mixed plans of quantc for vLLM, both as compressed-tensors folders, in one run.

    python -m benchmarks.quality.llm_compressor MODEL --python OTHER/bin/python --text FILE --calib FILE

llm-compressor (package llmcompressor) runs in a Python of its own, --python, on the same calibration windows: 4 bits,
symmetric, in groups of --group-size, all else by its defaults. quantc gets averages of bits, --avg-bits, and --target
vllm. Bits are those of the linears inside the blocks, scales counted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import quantc
from benchmarks.common import describe, machine, markdown, quantize, run_measured, write_json
from benchmarks.quality.autoround import save_original, save_windows

# Runs where llmcompressor is installed, without quantc.
GPTQ = """
import sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, windows, group_size, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
rows = [window[0].tolist() for window in torch.load(windows)]
dataset = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
recipe = GPTQModifier(
    config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
)
oneshot(
    model=model, dataset=dataset, recipe=recipe, max_seq_length=len(rows[0]), num_calibration_samples=len(rows),
    pipeline="sequential",
)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(folder).save_pretrained(out)
"""


def make(args: argparse.Namespace, scratch: Path) -> list[tuple[str, Path, float]]:
    """Make the folders; return a name, the place and CPU seconds of each."""
    save_windows(args, scratch / "windows.pt")
    theirs = scratch / "llm-compressor"
    settings = [scratch / "original", scratch / "windows.pt", args.group_size, theirs]
    measured = run_measured([args.python, "-c", GPTQ, *map(str, settings)], args.threads)
    made = [(f"llm-compressor, GPTQ w4g{args.group_size}", theirs, measured.cpu_seconds)]
    calibration = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len}
    for average in args.avg_bits:
        packed, folder = scratch / f"packed-{average}", scratch / f"quantc-{average}"
        measured, _ = quantize(
            str(scratch / "original"), packed, args.threads, avg_bits=average, target="vllm", preset=args.preset,
            **calibration,
        )  # fmt: skip
        quantc.export(packed, to="vllm", out=folder)
        made.append((f"quantc, {args.preset}, --avg-bits {average}", folder, measured.cpu_seconds))
    return made


def measure(args: argparse.Namespace, scratch: Path, made: list[tuple[str, Path, float]]) -> list[dict[str, Any]]:
    """Return a row for each folder: bits, KL divergence from the original, perplexity, CPU seconds."""
    folders = [folder for _, folder, _ in made]
    found = quantc.compare(scratch / "original", *folders, text=args.text, windows=args.windows, dtype="float32")
    return [
        {
            "tool": name, "bits": each.bits_per_weight, "kl": each.mean_kl, "perplexity": each.perplexity,
            "top1": each.top1_agreement, "cpu_seconds": seconds,
        }
        for (name, _, seconds), each in zip(made, found.models[1:], strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = describe(__doc__)
    parser.add_argument("model")
    parser.add_argument("--python", required=True, help="a Python that has llmcompressor")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--avg-bits", nargs="+", type=float, default=[4.0, 4.125])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/llm_compressor.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llm-compressor-") as name:
        scratch = Path(name)
        save_original(args.model, scratch / "original")
        rows = measure(args, scratch, make(args, scratch))
    settings = {key: str(value) for key, value in vars(args).items() if key != "python"}
    write_json(args.out, {"machine": machine(), "settings": settings, "rows": rows})
    print(markdown([{key: str(value) for key, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
