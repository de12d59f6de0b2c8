"""MLX's container, mode `affine`, for mlx-lm: weights are scales * code + biases."""

from __future__ import annotations

from typing import Any

import torch

from ...numerics.qtensor import QTensor
from .base import Described, FolderContainer, Scheme, zero_codes
from .older_config import older_settings
from .places import stacked_name
from .words import rows_in_words


class Mlx(FolderContainer):
    """Words along the inputs; embedding and head may be packed too."""

    name = "mlx"
    stacks_experts = True

    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        scales = tensor.scales.float()
        return {
            "weight": rows_in_words(tensor.codes, tensor.spec.bits).view(torch.uint32),
            "scales": scales.to(dtype),
            "biases": (-zero_codes(tensor).float() * scales).to(dtype),
        }

    def readers(self, described: Described) -> list[str]:
        return ["mlx-lm"]

    def config(self, described: Described) -> dict[str, Any]:
        settings: dict[str, Any] = {**_scheme(described.common), "mode": "affine"}
        settings |= {name: _scheme(scheme) for name, scheme in described.others.items()}
        for experts in described.experts:
            others = {leaf: scheme for leaf, scheme in experts.schemes.items() if scheme != described.common}
            for leaf, scheme in others.items():
                settings[stacked_name(experts.prefix, leaf)] = scheme is not None and _scheme(scheme)
        settings |= {name: False for name in described.floats}
        return {"quantization": settings, "quantization_config": settings, **older_settings(described.settings)}

    def notes(self, described: Described) -> list[str]:
        if all(scheme.symmetric for scheme in described.all_schemes):
            return []
        return ["MLX stores zero points times scales, which the dtype of scales rounds; symmetric codes are exact"]


def _scheme(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits}
