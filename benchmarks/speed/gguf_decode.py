"""Decode speed in llama.cpp: a file by quantc beside one by llama.cpp's quantizer, every tensor of the same type.

    python -m benchmarks.speed.gguf_decode demo:smollm2 --llama-cpp FOLDER

Both are loaded and take turns; the best of the rounds of each counts. FOLDER: see quality/llama_quantizer.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

import quantc
from benchmarks.common import describe, machine, markdown, write_json
from benchmarks.quality.gguf import write_floats
from benchmarks.quality.llama_quantizer import run_quantizer
from quantc.evaluation.decode_speed import measure_decode_speed
from quantc.evaluation.llama_cpp_model import LEAST_CONTEXT, LlamaCppModel
from quantc.frontend import open_model

TYPES = {"Q8_0": "q8_0", "Q4_0": "q4_0"}  # llama.cpp's mix, without an importance matrix -> quantc's format


def make(args: argparse.Namespace, folder: Path, mix: str) -> dict[str, Path]:
    """Return both files; raises ValueError where their types differ."""
    floats = folder / "float.gguf"
    if not floats.exists():
        source = open_model(args.model)
        write_floats(source.load_whole(torch.float32), source.tokenizer, floats)
    files = {"llama.cpp": folder / f"llama.cpp-{mix}.gguf", "quantc": folder / f"quantc-{mix}.gguf"}
    run_quantizer(args.llama_cpp, floats, files["llama.cpp"], mix)
    quantc.quantize(
        args.model, formats=[TYPES[mix]], head_bits=8, method="rtn", calib="none", out=files["quantc"], force=True
    )
    types = [{tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors} for file in files.values()]
    if types[0] != types[1]:
        raise ValueError(f"the two files of {mix} have tensors of different types")
    return files


def compare(args: argparse.Namespace, folder: Path, mix: str) -> dict[str, Any]:
    """Return the best speed of both files over rounds in which they take turns."""
    sources = {name: open_model(str(file)) for name, file in make(args, folder, mix).items()}
    models: dict[str, Any] = {
        name: LlamaCppModel(source, LEAST_CONTEXT)  # type: ignore[arg-type]
        for name, source in sources.items()
    }
    best = dict.fromkeys(models, 0.0)
    for number in range(args.rounds):
        for name in sorted(models, reverse=number % 2 == 1):
            best[name] = max(best[name], measure_decode_speed(models[name], sources[name].tokenizer))
    return {"type": mix, **{f"{name}, tokens/s": speed for name, speed in best.items()}} | {
        "ratio": best["quantc"] / best["llama.cpp"]
    }


def main() -> None:
    parser = describe(__doc__)
    parser.add_argument("model")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gguf_decode.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gguf-decode-") as scratch:
        rows = [compare(args, Path(scratch), mix) for mix in TYPES]
    write_json(args.out, {"machine": machine(), "model": args.model, "rows": rows})
    print(markdown([{key: f"{v:.2f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
