"""Peak memory of quantizing a model of two billion parameters, against the project's own bound.

A synthetic Llama checkpoint (random bfloat16 weights, many layers) and one with half the layers are written,
and each is quantized in a process of its own, round-to-nearest, GPTQ, GPTQ with `tune`, and the preset best. Training
takes a few steps only, as memory is the same after the first. Measured: its peak resident set size, whole command.
Bound: embedding and head + three blocks + hidden states of the calibration set + 1.5 GB; the first two in the
checkpoint's bfloat16, hidden states in float32. The peak must not grow with the number of layers.

Disk needed, with the defaults: 4.3 GB for a checkpoint and 1.4 GB for what is made from it, all removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import describe, machine, markdown, quantize, write_json

ALLOWANCE = 1_500_000_000  # bytes
VOCABULARY, HEAD_DIM = 32_000, 128
TUNE_STEPS, DISTILL_STEPS = 3, 2
SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Llama decoder with an untied head."""

    hidden: int
    intermediate: int
    layers: int

    @property
    def outside(self) -> int:
        """Weights of embedding and head."""
        return 2 * VOCABULARY * self.hidden

    @property
    def block(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.outside + self.layers * self.block + self.hidden

    def bound(self, tokens: int) -> int:
        """Bytes that quantization may hold at once, with so many calibration tokens."""
        return 2 * (self.outside + 3 * self.block) + 4 * tokens * self.hidden + ALLOWANCE


def write_checkpoint(shape: Shape, folder: Path) -> int:
    """A transformers folder with random weights, one shard for each block; returns the weights' bytes."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    heads = shape.hidden // HEAD_DIM
    LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", vocab_size=VOCABULARY,
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=False,
        max_position_embeddings=2048,
    ).save_pretrained(folder)  # fmt: skip
    write_tokenizer(folder)
    return _write_shards(shape, folder)


def _write_shards(shape: Shape, folder: Path) -> int:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(_tensor_names(shape)):
        tensors = {name: _random(name, size, generator) for name, size in names.items()}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _tensor_names(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of every shard: what lies outside the blocks, then each block."""
    h, i = shape.hidden, shape.intermediate
    outside = {"model.embed_tokens.weight": (VOCABULARY, h), "model.norm.weight": (h,)}
    shards: list[dict[str, tuple[int, ...]]] = [outside, {"lm_head.weight": (VOCABULARY, h)}]
    for layer in range(shape.layers):
        own: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (h, h) for name in "qkvo"}
        own |= {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        own |= {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
        shards.append({f"model.layers.{layer}.{name}.weight": size for name, size in own.items()})
    return shards


def _random(name: str, size: tuple[int, ...], generator: Any) -> Any:
    """Norms are ones; matrices keep the scale of what they multiply."""
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    scale = 1.0 if "embed" in name else size[-1] ** -0.5
    return torch.randn(size, generator=generator).mul_(scale).bfloat16()


def write_tokenizer(folder: Path) -> None:
    """One token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


def write_best(file: Path) -> str:
    """The preset best, with few steps of training, as a recipe file; returns its name."""
    import yaml

    from quantc.recipe import preset

    recipe = preset("best").with_settings(tune={"steps": TUNE_STEPS}, distill={"steps": DISTILL_STEPS})
    file.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    return str(file)


def measure(shape: Shape, folder: Path, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result: quantize a checkpoint and compare its peak with bound and checkpoint."""
    tokens = 0 if method == "rtn" else args.samples * args.seq_len
    options = {"samples": args.samples, "seq_len": args.seq_len} if tokens else {}
    if method == "tune":
        options["tune_steps"] = TUNE_STEPS
    if method == "best":
        options["recipe"] = write_best(folder.with_name("best.yaml"))
    out = folder.with_name("quantized")
    rounding = "rtn" if method == "rtn" else "gptq"
    measured, summary = quantize(str(folder), out, threads=args.threads, bits=args.bits, method=rounding, **options)
    shutil.rmtree(out)
    peak, bound = measured.peak_rss_bytes, shape.bound(tokens)
    print(f"{method}, {shape.layers} layers: peak {peak / 1e9:.2f} GB", file=sys.stderr, flush=True)
    return {
        "method": method,
        "layers": shape.layers,
        "parameters": shape.parameters,
        "checkpoint_bytes": summary["source_bytes"],
        "calibration_tokens": tokens,
        "peak_rss_bytes": peak,
        "bound_bytes": bound,
        "within_bound": peak <= bound,
        "peak_over_checkpoint": peak / summary["source_bytes"],
        "quantized_bytes": summary["weights_bytes"],
        "cpu_seconds": measured.cpu_seconds,
        "wall_seconds": measured.wall_seconds,
    }


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of peak memory that each further layer costs, by method."""
    found = {}
    for method in {row["method"]: None for row in rows}:
        few, many = sorted((row for row in rows if row["method"] == method), key=lambda row: row["layers"])
        grown = many["peak_rss_bytes"] - few["peak_rss_bytes"]
        found[method] = grown / (many["layers"] - few["layers"])
    return found


def show(rows: list[dict[str, Any]], grown: dict[str, float], block_bytes: int) -> None:
    def gigabytes(row: dict[str, Any], key: str) -> str:
        return f"{row[key] / 1e9:.2f} GB"

    print(markdown([
        {
            "method": row["method"],
            "layers": row["layers"],
            "parameters": f"{row['parameters'] / 1e9:.2f} G",
            "checkpoint": gigabytes(row, "checkpoint_bytes"),
            "peak RSS": gigabytes(row, "peak_rss_bytes"),
            "bound": gigabytes(row, "bound_bytes"),
            "peak / checkpoint": f"{row['peak_over_checkpoint']:.2f}",
            "CPU s": f"{row['cpu_seconds']:.0f}",
        }
        for row in rows
    ]))  # fmt: skip
    for method, grows in grown.items():
        print(f"{method}: {grows / 1e6:+.1f} MB for each further layer (a block is {block_bytes / 1e6:.0f} MB)")


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 128")
    parser.add_argument("--intermediate", type=int, default=4096, help="width of the MLP")
    parser.add_argument("--layers", type=int, default=48, help="layers of the whole model")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "tune", "best"], help="what to measure")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens in each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write checkpoints [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"), help="result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    whole = Shape(args.hidden, args.intermediate, args.layers)
    half = Shape(args.hidden, args.intermediate, args.layers // 2)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="memory-") as scratch:
        rows = []
        for shape in (half, whole):
            folder = Path(scratch) / f"layers-{shape.layers}"
            write_checkpoint(shape, folder)
            rows += [measure(shape, folder, method, args) for method in args.methods]
            shutil.rmtree(folder)
    grown = growth(rows)
    show(rows, grown, 2 * whole.block)
    result = {
        "shape": {**asdict(whole), "vocabulary": VOCABULARY, "dtype": "bfloat16"},
        "bits": args.bits,
        "bound": "2 bytes x (embedding + head + 3 blocks) + 4 bytes x hidden states + 1.5e9",
        "rows": rows,
        "bytes_per_further_layer": grown,
        "machine": machine(),
    }
    write_json(args.out, result)


if __name__ == "__main__":
    main()
