"""Small floats as compressed-tensors has them: NVFP4, MXFP4, and FP8 with a scale for each row.

Read in compressed-tensors 0.20: compressors/nvfp4, mxfp4 and naive_quantized. Codes are quantc's own: E2M1 and E4M3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...numerics.packing import pack_bits
from ...numerics.qtensor import QTensor
from .units import UNIT

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SmallFloat:
    """form: the name of the format. weights: what a config group says. parts: of a weight, by a dtype for scales."""

    form: str
    weights: dict[str, Any]
    parts: Callable[[QTensor, torch.dtype], Parts]


def _nvfp4(tensor: QTensor, dtype: torch.dtype) -> Parts:
    """Return values in pairs, scales, and what these are divided by."""
    scales, unit = tensor.scales.view(torch.float8_e4m3fn), tensor.more[UNIT]
    return {"weight_packed": pack_bits(tensor.codes, 4), "weight_scale": scales, "weight_global_scale": 1 / unit}


def _mxfp4(tensor: QTensor, dtype: torch.dtype) -> Parts:
    return {"weight_packed": pack_bits(tensor.codes, 4), "weight_scale": tensor.scales}


def _fp8(tensor: QTensor, dtype: torch.dtype) -> Parts:
    return {"weight": tensor.codes.view(torch.float8_e4m3fn), "weight_scale": tensor.scales.to(dtype)}


FP4 = {"num_bits": 4, "type": "float"}
SMALL_FLOATS = {
    "nvfp4": SmallFloat(
        "nvfp4-pack-quantized",
        {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}, _nvfp4,
    ),
    "mxfp4": SmallFloat(
        "mxfp4-pack-quantized",
        {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, _mxfp4,
    ),
    "fp8": SmallFloat(
        "naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}, _fp8
    ),
}  # fmt: skip
