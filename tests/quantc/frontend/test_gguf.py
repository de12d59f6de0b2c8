"""GGUF files as models: what their headers say of completeness, and how tensors are decoded."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from quantc.errors import ModelError
from quantc.export.gguf.blocks import TYPES
from quantc.frontend import open_model
from quantc.frontend.gguf_files import open_parts
from quantc.frontend.gguf_tensors import StoredTensors
from tests.quantc.frontend.tiny_gguf import gguf, tensors, write


def test_a_tensor_that_is_missing_is_found_at_the_start(tmp_path: Path) -> None:
    found = tensors()
    del found["blk.1.ffn_down.weight"]
    write(tmp_path / "tiny.gguf", found)
    with pytest.raises(ModelError) as caught:
        open_model(tmp_path / "tiny.gguf")
    assert str(caught.value) == (
        f"{tmp_path / 'tiny.gguf'}: the tensor model.layers.1.mlp.down_proj.weight is not in the file; a complete GGUF "
        "file is needed, so fetch it again."
    )


def test_a_tensor_that_the_model_does_not_take(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", tensors() | {"rope_freqs.weight": np.ones(4, dtype=np.float32)})
    assert open_model(tmp_path / "tiny.gguf").notes == [
        "tensors of the file are no part of the model and were left out: rope_freqs.weight"
    ]


def test_a_table_is_decoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, decoding 6-bit blocks takes five times the values."""
    monkeypatch.setattr("quantc.numerics.strips.STRIP", 1 << 16)
    kind = TYPES["Q6_K"]
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (4000, kind.row_bytes(1024)), generator=draw).to(torch.uint8)
    rows.view(4000, 4, kind.block_bytes)[..., -1] = 0x1C  # scales are small numbers
    writer = gguf.GGUFWriter(tmp_path / "table.gguf", "llama")
    writer.add_tensor("token_embd.weight", rows.numpy(), raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader, files = open_parts([tmp_path / "table.gguf"])
    tracemalloc.start()
    found = StoredTensors(files).values(reader.tensors[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * found.nbytes
    assert np.array_equal(found, kind.values(kind.unpack(rows)).numpy())
