"""AutoRound's container: GPTQ's tensors, version 1, and a config that says of every layer how it is stored."""

from __future__ import annotations

from typing import Any

import torch

from ...numerics.qtensor import QTensor
from .base import Described, FolderContainer, Scheme
from .gptq import gptq_parts


class AutoRound(FolderContainer):
    """Symmetric codes; widths may differ."""

    name = "auto-round"

    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return gptq_parts(tensor, less_one=True)

    def readers(self, described: Described) -> list[str]:
        return ["transformers with auto-round", "vLLM"]

    def config(self, described: Described) -> dict[str, Any]:
        experts = [pair for each in described.experts for pair in each.names() if pair[1] != described.common]
        extra = {name: _scheme(scheme) for name, scheme in [*described.others.items(), *experts]}
        extra |= {name: _scheme(None) for name in described.inner_floats}
        settings = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "block_name_to_quantize": ",".join(described.blocks),
            **_scheme(described.common),
        }
        if extra:
            settings["extra_config"] = extra
        return {"quantization_config": settings}


def _scheme(scheme: Scheme | None) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 16, "data_type": "float"}
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric, "data_type": "int"}
