"""A tiny Llama of random weights as a GGUF file, whole or in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
WIDTH, INNER, VOCABULARY = 32, 48, 40
TOKENS = [f"<0x{token:02X}>" if token else "" for token in range(VOCABULARY)]

Blocks = tuple[np.ndarray, "gguf.GGMLQuantizationType"]  # bytes (rows, bytes of a row) and the type of their blocks


def tensors(head: bool = True, width: int = WIDTH, inner: int = INNER) -> dict[str, np.ndarray]:
    """The weights by their names in the file."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, width), "output_norm": (width,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (inner, width) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (width, inner)}
        shapes |= {f"blk.{block}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"output": (VOCABULARY, width)} if head else {}  # the last one, so that it is in the last part
    return {f"{name}.weight": 0.2 * random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write(
    file: Path,
    found: dict[str, np.ndarray] | None = None,
    per_part: int = 0,
    blocks: dict[str, Blocks] | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> list[Path]:
    """Write these weights, or those of `tensors`; returns the files. per_part: tensors in each part. blocks: as stored,
    in place of floats."""
    found = tensors() if found is None else found
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=per_part, endianess=endianess)
    writer.add_context_length(64)
    writer.add_embedding_length(found["token_embd.weight"].shape[1])
    writer.add_block_count(2)
    writer.add_feed_forward_length(found["blk.0.ffn_up.weight"].shape[0])
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.5 * token for token in range(VOCABULARY)])
    for name, values in found.items():
        content, kind = (blocks or {}).get(name, (values, None))
        writer.add_tensor(name, content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(file.parent.glob(f"{file.stem}-*.gguf")) if per_part else [file]
