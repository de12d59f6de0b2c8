"""Intact files of every kind that quantc reads, made from one tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import quantc
from quantc.checkpoint.writer import CheckpointWriter
from quantc.plan import read_plan
from quantc.recipe import preset
from tests.families import VOCAB, build
from tests.helpers import save_with_tokenizer, tiny_text


def make(folder: Path) -> Path:
    """Fill a folder with a source model, a checkpoint of it, an interrupted run and files by themselves."""
    torch.manual_seed(0)
    model = build("llama")
    save_with_tokenizer(model, folder / "model")
    model.save_pretrained(folder / "shards", max_shard_size="40KB")
    packed = folder / "packed"
    quantc.quantize(folder / "model", out=packed, plan=_mixed_plan(folder), method="rtn", calib="none")
    alone = folder / "alone"
    alone.mkdir()
    for name in ("plan.yaml", "report.json"):
        shutil.copy(packed / name, alone / name)
    (alone / "recipe.yaml").write_text(preset("best").to_yaml(), encoding="utf-8")
    (alone / "rows.jsonl").write_text(_rows(), encoding="utf-8")
    (alone / "text.txt").write_text(
        "\n<|endoftext|>\n".join(tiny_text(20, seed) for seed in range(4)), encoding="utf-8"
    )
    _interrupt(folder)
    shutil.copy(folder / "half.unfinished" / "resume.json", alone / "resume.json")
    _write_gguf(folder / "gguf" / "model.gguf")
    return folder


def resume(folder: Path) -> None:
    """Continue the interrupted run of a corpus."""
    quantc.quantize(
        folder / "model", out=folder / "half", bits=4, group_size=16, method="rtn", calib="none", resume=True
    )


def _mixed_plan(folder: Path) -> Path:
    """A plan in which linears are stored in several ways; written once without a text, then edited."""
    plain = {"bits": 4, "group_size": 16, "method": "rtn", "calib": "none", "head_bits": "keep"}
    quantc.quantize(folder / "model", out=folder / "first", **plain)  # type: ignore[arg-type]
    plan = read_plan(folder / "first" / "plan.yaml")
    kinds: list[dict[str, Any]] = [
        {"bits": 3, "rank": 2}, {"symmetric": True}, {"bits": 5, "grouping": "per_ic"}, {"hadamard": 16},
        {"sparsity": 0.5}, {"two_of_four": True}, {"code": "trellis", "group_size": -1}, {},
    ]  # fmt: skip
    for place, name in enumerate(plan.specs):
        spec = plan.specs[name]
        assert spec is not None
        plan.specs[name] = type(spec)(**{**spec.to_dict(), **kinds[place % len(kinds)]})
    shutil.rmtree(folder / "first")
    plan.write(folder / "plan.yaml")
    return folder / "plan.yaml"


class _Stopped(Exception):
    """Ends a run in its second block."""


def _interrupt(folder: Path) -> None:
    original = CheckpointWriter.add

    def add(self: CheckpointWriter, name: str, tensor: torch.Tensor) -> None:
        if ".layers.1." in name:
            raise _Stopped
        original(self, name, tensor)

    CheckpointWriter.add = add  # type: ignore[method-assign]
    try:
        resume(folder)
    except _Stopped:
        return
    finally:
        CheckpointWriter.add = original  # type: ignore[method-assign]


def _rows() -> str:
    words = [tiny_text(12, seed) for seed in range(12)]
    talk = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": words[1]}]
    rows: list[Any] = [
        *({"text": text} for text in words),
        *[{"messages": [{"role": "system", "content": words[2]}, *talk, *talk], "tools": []}] * 4,
        {"conversations": [{"from": "human", "value": words[0]}, {"from": "gpt", "value": words[1]}]},
        {"prompt": words[0], "completion": words[1]},
        {"instruction": words[0], "input": words[1], "output": words[2]},
        {"prompt": words[0], "chosen": talk, "rejected": talk},
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_gguf(file: Path) -> None:
    import gguf

    file.parent.mkdir()
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    sides = {
        "attn_q": (32, 32), "attn_k": (32, 32), "attn_v": (32, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
        "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
    }  # fmt: skip
    shapes = {f"blk.0.{name}.weight": shape for name, shape in sides.items()}
    shapes |= {"token_embd.weight": (VOCAB, 32), "output.weight": (VOCAB, 32), "output_norm.weight": (32,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
