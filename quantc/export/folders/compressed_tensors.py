"""compressed-tensors, `pack-quantized`: what llm-compressor writes, and vLLM, SGLang and transformers load.

Format: https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized). Codes of 2 to 8 bits lie in
dense words along the inputs; the layout of 3, 5, 6 and 7 bits is that of version 0.18 and later.
"""

from __future__ import annotations

from typing import Any

import torch

from ...numerics.qtensor import QTensor
from .base import Described, FolderContainer, Scheme
from .words import columns_in_words, rows_in_words

FORMAT = "pack-quantized"


class CompressedTensors(FolderContainer):
    """Modules by schemes, each a group of the config with the names of its modules."""

    name = "compressed-tensors"
    readers = "vLLM, SGLang and transformers with compressed-tensors"

    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        bits = tensor.spec.bits
        found = {
            "weight_packed": rows_in_words(tensor.codes, bits),
            "weight_scale": tensor.scales.to(dtype),
            "weight_shape": torch.tensor(tensor.shape),
        }
        if tensor.zeros is not None:
            found["weight_zero_point"] = columns_in_words(tensor.zeros, bits)
        return found

    def config(self, described: Described) -> dict[str, Any]:
        patterns = [(f"re:{each}", way) for experts in described.experts for each, way in experts.patterns()]
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in [*described.schemes.items(), *patterns]:
            if scheme is not None:
                by_scheme.setdefault(scheme, []).append(name)
        alone = len(by_scheme) == 1
        groups = {
            f"group_{number}": _group(scheme, ["Linear"] if alone else names)
            for number, (scheme, names) in enumerate(by_scheme.items())
        }
        settings: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*described.floats, *(pattern for pattern, scheme in patterns if scheme is None)],
            "kv_cache_scheme": None,
        }
        if alone and not described.common.symmetric:
            settings["dequantize"] = True  # transformers loads zero points this way alone; vLLM ignores the key
        return {"quantization_config": settings}

    def transformers_reads(self, described: Described) -> bool:
        return not (_experts_differ(described) or _floats_are_split(described)) and not (
            described.mixed and _has_zeros(described)
        )

    def notes(self, described: Described) -> list[str]:
        if _experts_differ(described):
            return ["transformers loads all experts by one scheme, and these have several"]
        if _floats_are_split(described):
            return ["transformers loads experts that are floats from --to compressed-tensors alone"]
        if not _has_zeros(described):
            return []
        if described.mixed:
            return ["transformers loads no checkpoint with zero points and several widths; vLLM does"]
        return ["transformers makes floats of all weights while it loads, as it does with zero points; vLLM does not"]


def _experts_differ(described: Described) -> bool:
    return len(described.expert_schemes - {None}) > 1


def _floats_are_split(described: Described) -> bool:
    """Return whether experts of floats are stored one by one, of which transformers takes all for packed ones."""
    return None in described.expert_schemes and described.splits_floats


def _has_zeros(described: Described) -> bool:
    return not all(scheme.symmetric for scheme in described.all_schemes)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    whole = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else scheme.group_size,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
