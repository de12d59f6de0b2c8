"""Every block type in a whole file: llama.cpp computes the logits of the weights that `values` gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from quantc.evaluation import llama_cpp
from quantc.export.gguf import proof
from quantc.export.gguf.architectures import architecture_of
from quantc.export.gguf.blocks import TYPES, Blocks, BlockType
from quantc.export.gguf.file import GgufWriter
from quantc.export.gguf.layout import ModelTensor, lay_out
from quantc.export.gguf.metadata import describe_model, describe_storage
from quantc.export.gguf.tokenizer import without_tokenizer
from tests.quantc.export.tiny import build, logits

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


@torch.no_grad()
def round_linears(model: PreTrainedModel, kind: BlockType) -> dict[str, Blocks]:
    """Give every matrix of the model the weights that ggml's own rounding makes of it; return their blocks."""
    libgguf = pytest.importorskip("libgguf")
    found = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            packed = np.asarray(libgguf.quantize_rows(weight.numpy(), kind.number)).reshape(len(weight), -1)
            found[name] = kind.unpack(torch.from_numpy(packed.view(np.uint8).copy()))
            weight.copy_(kind.values(found[name]))
    return found


def write(model: PreTrainedModel, blocks: dict[str, Blocks], kind: BlockType, file: Path) -> None:
    weights = dict(model.named_parameters())
    shapes = {n: ModelTensor(tuple(w.shape), kind if n in blocks else torch.float32) for n, w in weights.items()}
    architecture = architecture_of(model.config)
    tensors = lay_out(shapes, architecture, model.config)
    metadata = describe_model(architecture, model.config, "tiny") | describe_storage(tensors) | without_tokenizer()
    writer = GgufWriter(file, architecture.name, metadata, tensors)
    for tensor in tensors:
        assert tensor.source is not None
        if tensor.source in blocks:
            rows = kind.pack(blocks[tensor.source])
            writer.write([rows if tensor.rows is None else rows[tensor.rows]])
        else:
            writer.write([tensor.of_floats(weights[tensor.source])])
    writer.finish()


@pytest.mark.parametrize("kind", TYPES.values(), ids=list(TYPES))
def test_llama_cpp_reads_every_type(kind: BlockType, tmp_path: Path) -> None:
    model = build("mistral", hidden_size=256, intermediate_size=256, head_dim=64).requires_grad_(False)
    write(model, round_linears(model, kind), kind, tmp_path / "tiny.gguf")
    tokens = torch.randint(model.config.vocab_size, (48,), generator=torch.Generator().manual_seed(1))
    with llama_cpp.LlamaCpp(tmp_path / "tiny.gguf", 48) as found:
        agreement = proof.measure(logits(model, tokens), found.logits(tokens), None)
    assert agreement.error < 0.08  # 0.03 to 0.05, of activations in 8 bits: those of 8-bit weights have no less
