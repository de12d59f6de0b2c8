"""AutoRound's signed gradients against quantc's recipes, in one run: KL divergence and CPU seconds of whole commands.

Both quantize the linears inside the blocks to the same width and group size, asymmetric, on the same calibration
windows. AutoRound (Cheng et al. 2023, arXiv:2309.05516; package auto-round) runs in a Python of its own, --python, with
its defaults but for the number of steps a block; what it rounded is written unpacked, so both are scored alike. Each
command's CPU seconds are those of its process, start-up and writing included.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import Measured, describe, machine, markdown, quantize, run_measured, write_json

# Runs where auto-round is installed, without quantc.
AUTOROUND = """
import sys
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, windows, bits, group_size, steps, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
dataset = torch.load(windows)
rounder = AutoRound(
    model, tokenizer, scheme="W4A16", bits=int(bits), group_size=int(group_size), sym=False, iters=int(steps),
    nsamples=len(dataset), seqlen=dataset[0].shape[-1], dataset=dataset, device_map="cpu",
)
model, _ = rounder.quantize()
model.float().save_pretrained(out)
tokenizer.save_pretrained(out)
"""


def save_original(path: str, folder: Path) -> None:
    """The model as a transformers folder of float32 weights; a new one, since what came from GGUF cannot be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantc.frontend import open_model

    source = open_model(path)
    original = source.load_whole(torch.float32)
    config = copy.deepcopy(original.config)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(original.state_dict())
    model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)


def save_windows(args: argparse.Namespace, file: Path) -> None:
    """The calibration windows that quantc takes, as a list of (1, seq_len)."""
    import torch

    from quantc.calib_data import load_documents
    from quantc.calibration.tokens import tokenize_documents
    from quantc.frontend import open_model

    tokenizer = open_model(args.model).tokenizer
    tokens = tokenize_documents(tokenizer, load_documents(args.calib), args.samples, args.seq_len, seed=0)
    torch.save(list(tokens.split(1)), file)


def run_autoround(args: argparse.Namespace, scratch: Path, steps: int) -> tuple[Measured, Path]:
    """What it cost, and the folder of the unpacked model."""
    out = scratch / f"autoround-{steps}"
    settings = [scratch / "windows.pt", args.bits, args.group_size, steps, out]
    measured = run_measured(
        [args.python, "-c", AUTOROUND, str(scratch / "original"), *map(str, settings)], args.threads
    )
    return measured, out


def run_quantc(args: argparse.Namespace, scratch: Path, recipe: str) -> tuple[Measured, Path]:
    """Likewise by `quantc quantize`; a recipe is a file or a preset."""
    out = scratch / Path(recipe).stem
    options: dict[str, Any] = {"recipe" if recipe.endswith(".yaml") else "preset": recipe}
    options |= {"bits": args.bits, "group_size": args.group_size, "asymmetric": True}
    options |= {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len}
    if args.steps_of_tune is not None and "tune" in recipe:
        options["tune_steps"] = args.steps_of_tune
    return quantize(str(scratch / "original"), out, args.threads, **options)[0], out


def row_of(args: argparse.Namespace, scratch: Path, name: str, result: tuple[Measured, Path]) -> dict[str, Any]:
    import quantc

    measured, out = result
    found = quantc.evaluate(
        out, text=args.text, against=scratch / "original", context=args.seq_len, windows=args.windows
    )
    costs = {key: value for key, value in asdict(measured).items() if key != "output"}
    return {"tool": name, "mean_kl": found.mean_kl, "perplexity": found.perplexity, **costs}


def show(rows: list[dict[str, Any]]) -> None:
    last = next((row["cpu_seconds"] for row in reversed(rows) if row["tool"].startswith("AutoRound")), None)
    print(markdown([
        {
            "tool": row["tool"],
            "KL": f"{row['mean_kl']:.4f}",
            "perplexity": f"{row['perplexity']:.2f}",
            "CPU s": f"{row['cpu_seconds']:.0f}",
            "of AutoRound's": f"{row['cpu_seconds'] / last:.2f}" if last else "",
            "peak RSS": f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        }
        for row in rows
    ]))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("model", help="as `quantc quantize` takes it")
    parser.add_argument("--python", required=True, help="a Python with auto-round")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 50], help="of AutoRound, a block")
    parser.add_argument("--recipes", nargs="*", default=["balanced"], help="presets and recipe files of quantc")
    parser.add_argument("--steps-of-tune", type=int, help="a block, for recipes named after tune")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/autoround.json"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="autoround-") as folder:
        scratch = Path(folder)
        save_original(args.model, scratch / "original")
        save_windows(args, scratch / "windows.pt")
        for recipe in args.recipes:
            rows.append(row_of(args, scratch, f"quantc, {Path(recipe).stem}", run_quantc(args, scratch, recipe)))
            show(rows[-1:])
        for steps in args.steps:
            rows.append(row_of(args, scratch, f"AutoRound, {steps} steps", run_autoround(args, scratch, steps)))
            show(rows[-1:])
    show(rows)
    write_json(args.out, {"model": Path(args.model).name, "bits": args.bits, "machine": machine(), "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
