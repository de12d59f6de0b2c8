"""Models whose tensors llama.cpp's quantizer was asked about, and what it said (mixes.json).

    python -m tests.quantc.export.mix_models FOLDER

asks about models that are not in there; FOLDER: of libllama.so, see benchmarks/quality/llama_quantizer.py.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from quantc.export.gguf.layout import FileTensor, ModelTensor, lay_out
from quantc.export.gguf.metadata import Described, describe_file
from quantc.export.gguf.mixes import MIXES
from quantc.frontend.auto import build_skeleton
from tests.families import FAMILIES
from tests.quantc.export.tiny import MODELS, build, write_floats

FILE = Path(__file__).with_name("mixes.json")
LARGE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32,
}  # fmt: skip
SHARED = {**LARGE, "num_key_value_heads": 2}
WINDOWS = {
    "query_pre_attn_scalar": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 5,
    "num_hidden_layers": 10,
}
# Name -> the model of tiny.py, and what differs from it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("mistral", {**LARGE, "num_hidden_layers": 18, "tie_word_embeddings": True}),
    "untied": ("mistral", {**LARGE, "num_hidden_layers": 9, "tie_word_embeddings": False}),
    "shared": ("qwen3", {**SHARED, "num_hidden_layers": 16}),
    "no row of 256": ("llama", {"num_hidden_layers": 8}),
    "some rows of 256": ("qwen2", {"intermediate_size": 256, "num_hidden_layers": 17}),
    "eighty blocks": ("mistral", {**SHARED, "num_hidden_layers": 80}),
    "eighty blocks unshared": ("mistral", {**LARGE, "num_hidden_layers": 80}),
    "eight experts": ("mixtral", {**SHARED, "num_hidden_layers": 9, "num_local_experts": 8}),
    "four experts": ("qwen3_moe", {**LARGE, "num_hidden_layers": 9, "moe_intermediate_size": 256, "num_experts": 4}),
    "gemma2": ("gemma2", {**LARGE, **WINDOWS}),
    "gemma3": ("gemma3", {**SHARED, **WINDOWS}),
    "phi3": ("phi3", {**LARGE, "num_hidden_layers": 9}),
    "granite": ("granite", {**LARGE, "num_hidden_layers": 8}),
    "olmo2": ("olmo2", {**LARGE, "num_hidden_layers": 8}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_inner": 256, "n_head": 8, "n_layer": 9}),
}


def layout(name: str) -> tuple[list[FileTensor], Described]:
    """The tensors of a case's file, and what it says; no weight is made."""
    base, own = CASES[name]
    family, settings = MODELS[base]
    config = AutoConfig.for_model(FAMILIES[family].model_type, **{**FAMILIES[family].settings, **settings, **own})
    model = build_skeleton(config)
    tied = model.all_tied_weights_keys
    shapes = {name: ModelTensor(tuple(t.shape), t.dtype) for name, t in model.state_dict().items() if name not in tied}
    described = describe_file(config, None, name)
    assert described.table is not None
    return lay_out(shapes, described.table, config), described


def spell(types: dict[str, str]) -> dict[str, str]:
    """Types of tensors by what they are in a block, as runs in the order of blocks such as `Q4_K*3 Q6_K*1`."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: (int(name.split(".")[1]) if name.startswith("blk.") else -1, name)):
        if types[name] != "F32":
            kinds.setdefault(".".join(part for part in name.split(".") if not part.isdecimal()), []).append(types[name])
    return {kind: " ".join(f"{name}*{len(list(run))}" for name, run in groupby(found)) for kind, found in kinds.items()}


def write_importance(tensors: Sequence[FileTensor], file: Path) -> None:
    """Ones for every input: types do not depend on them, but on whether there are any."""
    with file.open("wb") as stream:
        stream.write(struct.pack("<i", len(tensors)))
        for tensor in tensors:
            count = tensor.shape[-1] * (tensor.shape[0] if len(tensor.shape) == 3 else 1)
            name = tensor.name.encode()
            stream.write(struct.pack("<i", len(name)) + name + struct.pack(f"<ii{count}f", 1, count, *[1.0] * count))


def record(library: Path) -> None:
    import gguf

    from benchmarks.quality.llama_quantizer import run_quantizer

    found: dict[str, dict[str, dict[str, str]]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        floats, importance, out = (Path(scratch) / name for name in ("floats.gguf", "importance.dat", "out.gguf"))
        for name, (base, own) in ((name, CASES[name]) for name in CASES if name not in found):
            tensors = write_floats(build(base, **own), floats)
            write_importance([tensor for tensor in tensors if len(tensor.shape) > 1], importance)
            for mix in MIXES:
                run_quantizer(library, floats, out, mix, importance)
                types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
                found.setdefault(name, {})[mix] = spell(types)
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
