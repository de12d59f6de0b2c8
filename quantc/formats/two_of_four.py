"""Weights of which two of every four along the inputs are dropped (2:4), as in docs/format.md."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import CheckpointError
from ..numerics.grids import arithmetic_of
from ..numerics.packing import pack_bits, unpack_bits
from ..numerics.qtensor import QTensor
from ..spec import PLACE_BITS, QuantSpec, packed_bytes, places
from .base import Part, Parts
from .dense import DENSE
from .low_rank import unpack_low_rank


class TwoOfFourFormat:
    """Parts: those of the dense format with codes for the weights that are kept only, and `places`, which of its four
    each of them is, by rising place."""

    name = "two-of-four"

    def layout(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> dict[str, Part]:
        n, count = shape[0], places(shape[1])
        return {
            **DENSE.layout(spec.dense(), shape, leading),
            **arithmetic_of(spec.grid).layout_codes((*leading, n, count)),
            "places": Part(torch.uint8, (*leading, n, packed_bytes(count, PLACE_BITS))),
        }

    def pack(self, tensor: QTensor) -> Parts:
        assert tensor.kept is not None
        kept, codes = _fours(tensor.kept.to(torch.uint8)), _fours(tensor.codes)
        at = kept.argsort(dim=-1, descending=True, stable=True)[..., :2]
        parts = DENSE.pack(replace(tensor, codes=codes.gather(-1, at).flatten(-2)))
        return {**parts, "places": pack_bits(at.to(torch.uint8).flatten(-2), PLACE_BITS)}

    def unpack(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> QTensor:
        k = shape[1]
        at = unpack_bits(parts["places"], PLACE_BITS, places(k)).unflatten(-1, (-1, 2)).long()
        if bool((at[..., 0] >= at[..., 1]).any()):
            raise CheckpointError(
                f"the places of a weight {shape} do not rise within their four, but each of them names an input of its "
                "own; copy the checkpoint again."
            )
        arithmetic = arithmetic_of(spec.grid)
        parameters = arithmetic.unpack_parameters(parts, spec.scales_shape(shape)[1])
        codes = arithmetic.zero_points(parameters, spec.groups, shape).to(torch.uint8).expand(*at.shape[:-2], k)
        stored = arithmetic.unpack_codes(parts, (shape[0], places(k))).unflatten(-1, (-1, 2))
        codes = _fours(codes).scatter(-1, at, stored).flatten(-2)[..., :k].contiguous()
        kept = torch.zeros(*at.shape[:-1], 4, dtype=torch.bool, device=at.device).scatter_(-1, at, True)
        kept = kept.flatten(-2)[..., :k].contiguous()
        return QTensor.of(spec, codes, parameters, kept=kept, **unpack_low_rank(parts))


def _fours(values: torch.Tensor) -> torch.Tensor:
    """Return values (..., K) as (..., ceil(K / 4), 4), filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % 4)).unflatten(-1, (-1, 4))


TWO_OF_FOUR = TwoOfFourFormat()
