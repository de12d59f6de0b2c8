"""Fine-grained FP8, as models are published in it: 8-bit floats with a scale for each block, row or tensor.

Read in transformers 5.23: integrations/finegrained_fp8.py, and in compressed-tensors 0.20:
entrypoints/convert/converters/fp8block_dequantizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from .base import Container, Packed, register
from .scaled import FLOAT8, scaled_tensor
from .settings import Settings
from .stored import Stored

ENDINGS = ("_scale_inv", "_scale")  # of what a tensor is multiplied by


@register
class Fp8(Container):
    """`weight_block_size` are the sides of a block."""

    methods = ("fp8", "fbgemm_fp8")
    beside = frozenset({"activation_scale", "input_scale", "input_scale_ub", "activation_scale_ub"})

    def __init__(self, settings: Settings):
        super().__init__(settings)
        rows, columns = settings.get("weight_block_size", tuple[int, int], (128, 128))
        if min(rows, columns) < 1:
            raise settings.wrong("weight_block_size", "a list of two sizes of at least 1")
        self._block = (rows, columns)
        self.rounds_activations = True

    def packed(self, stored: Stored) -> Iterator[Packed]:
        for name, header in stored.headers.items():
            if header.dtype in FLOAT8:
                there = [name + ending for ending in ENDINGS if name + ending in stored.headers]
                yield scaled_tensor(stored, name, (*there, name + ENDINGS[0])[0], self._block)
