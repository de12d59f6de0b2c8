"""GGUF files by quantc and by llama.cpp's quantizer, of the same size, measured by llama.cpp.

    python -m benchmarks.quality.gguf MODEL --llama-cpp FOLDER --text FILE --calib FILE

The float model is written as float16. llama.cpp's quantizer makes each mix from it, with an importance matrix of the
same calibration windows that quantc takes. Then quantc makes a file of at most the same bytes. All are measured through
llama.cpp against the original on the same windows. FOLDER: where libllama.so of llama.cpp's release v0.5.0 is, see
llama_quantizer.py.
"""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantc
from benchmarks.common import describe, machine, markdown, write_json
from benchmarks.quality.llama_quantizer import run_quantizer
from quantc.calibration.tokens import CalibrationConfig, calibration_tokens
from quantc.export.gguf.architectures import architecture_of
from quantc.export.gguf.file import GgufWriter
from quantc.export.gguf.layout import FileTensor, ModelTensor, lay_out
from quantc.export.gguf.metadata import describe_model, describe_storage
from quantc.export.gguf.tokenizer import describe_tokenizer
from quantc.frontend import open_model

MIXES = ("Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")


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


def write_importance(model: nn.Module, tokens: torch.Tensor, tensors: list[FileTensor], file: Path) -> None:
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
    with torch.no_grad():
        for window in tokens:
            model(input_ids=window[None], use_cache=False)
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


def scored(file: Path, model: str, args: Any) -> dict[str, Any]:
    """Return what llama.cpp predicts with a file, against the original."""
    found = quantc.evaluate(file, text=args.text, against=model, context=args.context, windows=args.windows).to_dict()
    return {"bytes": file.stat().st_size, "kl": found["mean_kl"], "perplexity": found["perplexity"]}


def compare(name: str, model: str, args: Any, scratch: Path) -> list[dict[str, Any]]:
    """Return a row for each mix: llama.cpp's file, and quantc's of at most its size."""
    source = open_model(model)
    config = CalibrationConfig(args.calib, args.samples, args.seq_len)
    tokens = calibration_tokens(source, config).tokens
    whole = source.load_whole(torch.float32)
    floats, importance = scratch / "float.gguf", scratch / "importance.dat"
    tensors = write_floats(whole, source.tokenizer, floats)
    write_importance(whole, tokens, tensors, importance)
    del whole
    rows = []
    for mix in args.mixes:
        theirs, ours = scratch / f"{mix}.gguf", scratch / f"quantc-{mix}.gguf"
        run_quantizer(args.llama_cpp, floats, theirs, mix, importance)
        size, started = theirs.stat().st_size, time.process_time()
        quantc.quantize(
            model, size=size, head_bits="auto", recipe=args.recipe, out=ours, calib=args.calib, samples=args.samples,
            seq_len=args.seq_len, force=True,
        )  # fmt: skip
        seconds = time.process_time() - started
        reference, found = scored(theirs, model, args), scored(ours, model, args)
        rows.append({
            "model": name, "mix": mix, "llama.cpp bytes": size, "llama.cpp KL": reference["kl"],
            "quantc bytes": found["bytes"], "quantc KL": found["kl"], "ratio": found["kl"] / reference["kl"],
            "quantc CPU s": round(seconds),
        })  # fmt: skip
        print(rows[-1], flush=True)
        for file in (theirs, ours):
            file.unlink()
    return rows


def main() -> None:
    parser = describe(__doc__)
    parser.add_argument("model")
    parser.add_argument("--name")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calib", default="builtin")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gguf-") as scratch:
        rows = compare(args.name or Path(args.model).name, args.model, args, Path(scratch))
    print(markdown(rows))
    if args.out:
        write_json(
            args.out, {"machine": machine(), "settings": {k: str(v) for k, v in vars(args).items()}, "rows": rows}
        )


if __name__ == "__main__":
    main()
