"""Block types against two independent decoders and one encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantc.errors import UsageError
from quantc.export.gguf.blocks import TYPES, Blocks, BlockType

gguf = pytest.importorskip("gguf")
KINDS = pytest.mark.parametrize("kind", TYPES.values(), ids=list(TYPES))


def random_blocks(kind: BlockType, rows: int = 3, columns: int = 512, seed: int = 0) -> Blocks:
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (rows, count), generator=draw)

    def floats(count: int) -> torch.Tensor:
        return torch.randn(rows, count, generator=draw).half()

    count = columns // kind.size
    blocks = Blocks(integers(0, len(kind.levels), columns).to(torch.uint8), floats(count))
    if kind.name == "MXFP4":
        blocks.scales = integers(0, 255, count).to(torch.uint8)
    if kind.minima:
        blocks.minima = floats(count)
    if kind.subs:
        low, dtype = -kind.sub_offset, torch.int8 if kind.sub_offset else torch.uint8
        blocks.sub_scales = integers(low, low + (1 << kind.sub_bits), count * kind.subs).to(dtype)
    if kind.subs and kind.minima:
        blocks.sub_minima = integers(0, 1 << kind.sub_bits, count * kind.subs).to(torch.uint8)
    return blocks


def same(first: Blocks, second: Blocks) -> bool:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all((a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@KINDS
def test_what_is_packed_comes_back(kind: BlockType) -> None:
    blocks = random_blocks(kind)
    rows = kind.pack(blocks)
    assert rows.shape == (3, kind.row_bytes(512))
    assert same(kind.unpack(rows), blocks)


@KINDS
def test_gguf_py_decodes_the_same_values(kind: BlockType) -> None:
    blocks = random_blocks(kind)
    number = gguf.GGMLQuantizationType[kind.name]
    assert (kind.number, kind.size, kind.block_bytes) == (number.value, *gguf.GGML_QUANT_SIZES[number])
    decoded = gguf.dequantize(kind.pack(blocks).numpy(), number)
    assert np.array_equal(decoded.view(np.uint32), kind.values(blocks).numpy().view(np.uint32))


@KINDS
def test_ggml_decodes_the_same_values(kind: BlockType) -> None:
    libgguf = pytest.importorskip("libgguf")
    blocks = random_blocks(kind)
    decoded = libgguf.dequantize_rows(kind.pack(blocks).numpy(), kind.number, n_per_row=512)
    assert np.array_equal(decoded, kind.values(blocks).numpy())


@KINDS
def test_bytes_of_ggml_are_read_and_written_again(kind: BlockType) -> None:
    libgguf = pytest.importorskip("libgguf")
    weights = np.random.default_rng(1).standard_normal((4, 512), dtype=np.float32)
    packed = np.asarray(libgguf.quantize_rows(weights, kind.number)).reshape(4, -1)
    rows = torch.from_numpy(packed.view(np.uint8).copy())
    blocks = kind.unpack(rows)
    assert torch.equal(kind.pack(blocks), rows)
    error = (kind.values(blocks) - torch.from_numpy(weights)).norm() / np.linalg.norm(weights)
    assert error < 0.4


@KINDS
def test_stacks_of_experts_keep_their_first_dimension(kind: BlockType) -> None:
    flat = random_blocks(kind, rows=6)
    stacked = Blocks(*(None if part is None else part.unflatten(0, (2, 3)) for part in vars(flat).values()))
    assert torch.equal(kind.pack(stacked), kind.pack(flat).unflatten(0, (2, 3)))
    assert torch.equal(kind.values(stacked), kind.values(flat).unflatten(0, (2, 3)))


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(UsageError) as caught:
        TYPES["Q4_0"].row_bytes(48)
    assert str(caught.value) == (
        "rows of 48 weights are no whole number of Q4_0's blocks of 32; choose a type of smaller blocks, or keep the "
        "weight in floats."
    )
