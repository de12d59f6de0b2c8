"""How the tensors of a GGUF file are stored: which types become weights, and in which dtype."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ModelError

# What holds a tensor's values where it is not float16: powers of two of MXFP4 blocks may be out of its range.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "MXFP4": torch.bfloat16}
SCALES = (".scale", ".weight.scale")  # end the name of what a whole weight is multiplied by, in NVFP4 files above all


def dtype_of(tensor: Any) -> torch.dtype:
    """Return the dtype of a tensor's values; float16 for dequantized blocks, which fit it to its last bit."""
    return DTYPES.get(tensor.tensor_type.name, torch.float16)


def check_types(file: Path, weights: Iterable[Any]) -> None:
    """Raise ModelError that names the first weight of a type that gguf-py does not decode."""
    weights = list(weights)
    decoded = {kind for kind in {tensor.tensor_type for tensor in weights} if _is_decoded(kind)}
    for tensor in weights:
        kind = tensor.tensor_type
        if kind not in decoded:
            raise ModelError(
                f"{file}: {tensor.name} is stored as {kind.name}, which the package gguf {version('gguf')} does not "
                "decode; use a file of another type."
            )


def _is_decoded(kind: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def check_scales(file: Path, weights: Iterable[Any], left_out: Iterable[Any]) -> None:
    """Raise ModelError where a weight's blocks are multiplied by a scale in a tensor of its own, which is not read."""
    owners = {tensor.name.removesuffix(".weight") for tensor in weights}
    for tensor in left_out:
        for ending in SCALES:
            owner = tensor.name.removesuffix(ending)
            if owner != tensor.name and owner in owners:
                raise ModelError(
                    f"{file}: {owner}.weight is multiplied by {tensor.name}, which transformers does not read; use a "
                    "file of another type, or the model's transformers folder."
                )
