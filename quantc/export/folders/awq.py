"""AWQ's container, version `gemm`: 4 bits, eight outputs in a word in an order of its own."""

from __future__ import annotations

from typing import Any

import torch

from ...numerics.qtensor import QTensor
from .base import Described, FolderContainer, zero_codes
from .gptq import known_readers, notes_of_experts
from .older_config import older_settings

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code is nibble i of a word (AutoAWQ, utils/packing_utils.py)


class Awq(FolderContainer):
    """Words along the outputs, one row an input; zero points as they are, also of symmetric codes."""

    name = "awq"

    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {
            "qweight": _in_order(tensor.codes.T),
            "qzeros": _in_order(zero_codes(tensor).T),
            "scales": tensor.scales.T.contiguous(),
        }

    def config(self, described: Described) -> dict[str, Any]:
        inner = described.inner_floats
        inner += [each.prefix for each in described.experts if None in each.schemes.values()]
        settings = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": described.common.bits,
            "group_size": described.common.group_size,
            "zero_point": True,
            "modules_to_not_convert": inner or None,
        }
        return {"quantization_config": settings, **older_settings(described.settings)}

    def readers(self, described: Described) -> list[str]:
        return ["vLLM", *known_readers(described, ["mlx-lm", "transformers with GPTQModel"])]

    def notes(self, described: Described) -> list[str]:
        return notes_of_experts(described)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """Return codes (R, N) uint8, N a multiple of 8, as int32 (R, N / 8)."""
    nibbles = codes.reshape(codes.shape[0], -1, len(ORDER))[..., list(ORDER)]
    packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return packed.contiguous().view(torch.int32)[..., 0]
