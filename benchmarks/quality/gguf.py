"""GGUF files by quantc and by llama.cpp's quantizer, of the same size, measured by llama.cpp.

    python -m benchmarks.quality.gguf --model NAME MODEL --llama-cpp FOLDER --text FILE --calib FILE

The float model is written as float16. llama.cpp's quantizer makes each mix from it, with an importance matrix of the
same calibration windows that quantc takes. Then quantc makes a file with its size as `--size`. All run in llama.cpp on
the same windows, beside the original. FOLDER: where libllama.so of its release v0.5.0 is, see llama_quantizer.py.
What is made stays in --work, and rows are added to --out as they come: a run continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import describe, machine, markdown, quantize, write_json
from benchmarks.quality.llama_quantizer import run_quantizer
from quantc.calibration.tokens import CalibrationConfig, calibration_tokens
from quantc.cli.console import SilentProgress
from quantc.evaluation.llama_cpp_model import LlamaCppModel
from quantc.evaluation.scores import score
from quantc.evaluation.text import read_text
from quantc.evaluation.windows import make_windows
from quantc.export.gguf.architectures import architecture_of
from quantc.export.gguf.file import GgufWriter
from quantc.export.gguf.layout import FileTensor, ModelTensor, lay_out
from quantc.export.gguf.metadata import describe_model, describe_storage
from quantc.export.gguf.tokenizer import describe_tokenizer
from quantc.frontend import open_model

MIXES = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
IDENTITY = ("model", "mix", "maker", "calibration")


def write_floats(model: Any, words: Any, file: Path) -> list[FileTensor]:
    """Write a model as a GGUF file of float16 and float32, and return its tensors."""
    weights = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    architecture = architecture_of(model.config)
    shapes = {
        name: ModelTensor(tuple(weight.shape), torch.float16 if weight.ndim > 1 else torch.float32)
        for name, weight in weights.items()
    }
    tensors = lay_out(shapes, architecture, model.config)
    metadata = describe_model(architecture, model.config, file.stem) | describe_storage(tensors)
    metadata |= describe_tokenizer(words, model.config.vocab_size)
    writer = GgufWriter(file, architecture.name, metadata, tensors)
    for tensor in tensors:
        weight = (
            tensor.read() if tensor.source is None and tensor.read else tensor.of_floats(weights[str(tensor.source)])
        )
        writer.write([weight.to(tensor.kind) if isinstance(tensor.kind, torch.dtype) else weight])
    writer.finish()
    return tensors


def write_importance(model: Any, tokens: torch.Tensor, tensors: list[FileTensor], file: Path) -> None:
    """Write llama.cpp's importance matrix: the mean square of every input of every linear, on tokens (samples, T)."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0].detach().double().flatten(0, -2)
            sums[name] = sums.get(name, torch.zeros(rows.shape[1], dtype=torch.float64)) + rows.square().mean(0)

        return add

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    logits = {"logits_to_keep": 1} if model.config.tie_word_embeddings else {}  # of a tied head there is no entry
    with torch.no_grad():
        for window in tokens:
            model(input_ids=window[None], use_cache=False, **logits)
    for hook in hooks:
        hook.remove()
    names = {tensor.source: tensor.name for tensor in tensors if tensor.source in sums}
    with file.open("wb") as stream:
        stream.write(struct.pack("<i", len(names)))
        for source, name in names.items():
            values = (sums[str(source)] / len(tokens)).float().numpy()
            encoded = name.encode()
            stream.write(
                struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, len(values)) + values.tobytes()
            )


class Original:
    """The original model with its logits kept in a folder: every file is compared with the same ones."""

    device = torch.device("cpu")

    def __init__(self, model: Any, folder: Path):
        self._model, self._folder = model, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: torch.Tensor, **settings: Any) -> Any:
        file = self._folder / f"{abs(hash(tuple(input_ids[0].tolist())))}.npy"
        if not file.exists():
            np.save(file, self._model(input_ids=input_ids, **settings).logits[0].numpy())
        return SimpleNamespace(logits=torch.from_numpy(np.load(file))[None])


class Scorer:
    """The windows of a text, and the original on them."""

    def __init__(self, model: str, args: argparse.Namespace, folder: Path):
        self.source = open_model(model)
        self.windows = make_windows(self.source.tokenizer, read_text(args.text), args.context, limit=args.windows)
        self.original: Any = Original(self.source.load_whole(torch.float32).eval(), folder)

    def __call__(self, file: Path) -> dict[str, Any]:
        """Return what llama.cpp predicts with a file, against the original."""
        longest = max(len(window.tokens) for window in self.windows)
        subject: Any = LlamaCppModel(open_model(str(file)), longest)  # type: ignore[arg-type]
        found = score(subject, self.original, self.windows, SilentProgress())
        return {
            "bytes": file.stat().st_size, "kl": found.mean_kl, "p99_kl": found.p99_kl,
            "perplexity": found.perplexity, "perplexity_original": found.perplexity_original,
            "top1": found.top1_agreement, "positions": found.positions,
        }  # fmt: skip


def prepare(model: str, args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Return the float file and the importance matrix that llama.cpp's quantizer takes, made where they are not."""
    floats, importance = folder / "float.gguf", folder / "importance.dat"
    if not importance.exists():
        source = open_model(model)
        tokens = calibration_tokens(source, CalibrationConfig(args.calib, args.samples, args.seq_len)).tokens
        whole = source.load_whole(torch.float32)
        tensors = write_floats(whole, source.tokenizer, floats)
        write_importance(whole, tokens, tensors, importance)
    return floats, importance


def make(
    maker: str, mix: str, size: int, model: str, args: argparse.Namespace, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Return a file of a mix by llama.cpp's quantizer, or one of `size` by quantc with a preset, and what it cost."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{maker}-{mix}.gguf"
    if maker == "llama.cpp":
        floats, importance = prepare(model, args, folder)
        run_quantizer(args.llama_cpp, floats, out, mix, importance)
        return out, {}
    calibration = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len}
    how = {"recipe": maker} if maker.endswith(".yaml") else {"preset": maker}
    measured, summary = quantize(model, out, args.threads, size=size, **how, **calibration)
    return out, {
        "cpu_seconds": measured.cpu_seconds, "wall_seconds": measured.wall_seconds,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "notes": [note for note in summary["notes"] if "metadata" not in note],  # which names a path of this machine
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows to read: quantc's files beside those of llama.cpp's quantizer."""
    theirs = {_file_of(row): row for row in rows if row["maker"] == "llama.cpp"}
    return [
        {
            "model": row["model"], "like": row["mix"], "maker": row["maker"], "bytes": f"{row['bytes']:,}",
            "KL": f"{row['kl']:.5f}", "perplexity": f"{row['perplexity']:.3f}", "top-1": f"{row['top1']:.1%}",
            "of llama.cpp's KL": f"{row['kl'] / theirs[_file_of(row)]['kl']:.2f}",
            "of its bytes": f"{row['bytes'] / theirs[_file_of(row)]['bytes']:.4f}",
            "CPU s": f"{row.get('cpu_seconds', 0):.0f}",
        }
        for row in rows if _file_of(row) in theirs
    ]  # fmt: skip


def _file_of(row: dict[str, Any]) -> tuple[str, ...]:
    return row["model"], row["calibration"], row["mix"]


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", nargs=2, required=True, metavar=("NAME", "SOURCE"), help="SOURCE as quantc takes it")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER", help="with libllama.so")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument(
        "--makers", nargs="+", default=["llama.cpp", "fast", "best"], help="llama.cpp, presets, recipes"
    )
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window scored")
    parser.add_argument("--windows", type=int, default=40, help="windows scored")
    parser.add_argument("--threads", type=int, default=2, help="of quantc")
    parser.add_argument("--work", type=Path, help="folder to keep files in [default: a temporary one]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gguf.json"), help="rows are added")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    name, model = args.model
    with tempfile.TemporaryDirectory(prefix="gguf-") as scratch:
        folder = (args.work or Path(scratch)) / name
        run(name, model, args, folder)


def run(name: str, model: str, args: argparse.Namespace, folder: Path) -> None:
    """Add the rows of a model that are not there yet."""
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    scorer = None
    for mix in args.mixes:
        for maker in args.makers:
            label = Path(maker).stem if maker.endswith(".yaml") else maker
            row = {"model": name, "mix": mix, "maker": label, "calibration": Path(args.calib).name}
            if any(all(done[key] == row[key] for key in IDENTITY) for done in rows):
                continue
            size = next((done["bytes"] for done in rows if done == {**done, **row, "maker": "llama.cpp"}), 0)
            file, costs = make(maker, mix, size, model, args, folder)
            scorer = scorer or Scorer(model, args, folder / "logits")
            settings = {key: getattr(args, key) for key in ("samples", "seq_len", "context", "windows")}
            text = Path(args.text).name
            rows.append({**row, **scorer(file), **costs, **settings, "text": text, "machine": machine()})
            write_json(args.out, rows)
            print(markdown(table(rows)[-1:]), flush=True)
            file.unlink()
    print(markdown([row for row in table(rows) if row["model"] == name]))


if __name__ == "__main__":
    main()
