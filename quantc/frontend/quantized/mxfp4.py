"""MXFP4 experts, as gpt-oss is published: stacks of E2M1 blocks with an exponent each, outputs before inputs.

Read in transformers 5.23: integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ModelError
from .base import Container, Packed, Parts, register
from .codes import fp4, to_float
from .stored import Stored

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK_BYTES = 16  # 32 weights


@register
class Mxfp4(Container):
    """`X_blocks` (E, N, G, 16) and `X_scales` (E, N, G) stand for `X` (E, 32 G, N)."""

    methods = ("mxfp4",)

    def packed(self, stored: Stored) -> Iterator[Packed]:
        for name, header in stored.headers.items():
            if name.endswith(BLOCKS):
                yield _stack(stored, name.removesuffix(BLOCKS), header.shape)


def _stack(stored: Stored, name: str, shape: tuple[int, ...]) -> Packed:
    parts = {"blocks": name + BLOCKS, "scales": name + SCALES}
    stored.part(parts["blocks"], ("U8",), name)
    stored.part(parts["scales"], ("U8", "F8_E8M0"), name)
    if len(shape) != 4 or shape[-1] != BLOCK_BYTES:
        raise ModelError(
            f"{stored.folder}: {parts['blocks']} has the shape {shape}, but (experts, outputs, blocks, {BLOCK_BYTES}) "
            "is needed; weights that belong to the quantization_config are needed."
        )
    stored.check_shape(parts["scales"], [shape[:-1]])
    experts, n, groups, _ = shape
    return Packed(name, (experts, 2 * BLOCK_BYTES * groups, n), parts, "mxfp4", _decode)


def _decode(parts: Parts) -> torch.Tensor:
    """Return values times the power of two of their block, with inputs before outputs; see Packed."""
    blocks, scales = parts["blocks"], to_float(parts["scales"])
    experts, n, groups = scales.shape
    values = torch.empty(experts, 2 * BLOCK_BYTES * groups, n)
    for expert in range(experts):
        values[expert] = fp4(blocks[expert].flatten(1), scales[expert], 2 * BLOCK_BYTES).T
    return values
