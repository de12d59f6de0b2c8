"""compressed-tensors, `pack-quantized`: what llm-compressor writes, and vLLM, SGLang and transformers load.

Format: https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized). Codes of 2 to 8 bits lie in
dense words along the inputs; the layout of 3, 5, 6 and 7 bits is that of version 0.18 and later.
"""

from __future__ import annotations

from typing import Any

import torch

from ...numerics.qtensor import QTensor
from ...planning.targets import NVFP4
from ...units import plural
from .base import Described, FolderContainer, Scheme
from .rotations import rotation_matrices, transform_config
from .small_floats import SMALL_FLOATS
from .words import columns_in_words, rows_in_words

FORMAT = "pack-quantized"
MIXED = "mixed-precision"
FP4 = (NVFP4, "mxfp4")


EVERYWHERE = {4, 8}  # widths that several of vLLM's kernels run


class CompressedTensors(FolderContainer):
    """Modules by schemes, each a group of the config with the names of its modules."""

    name = "compressed-tensors"

    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if (small := SMALL_FLOATS.get(tensor.spec.code)) is not None:
            return small.parts(tensor, dtype)
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
                both = dict.fromkeys((described.aliases.get(name, name), name))
                by_scheme.setdefault(scheme, []).extend(both)
        alone, forms = len(by_scheme) == 1, {_form(scheme) for scheme in by_scheme}
        groups = {
            f"group_{number}": _group(scheme, ["Linear"] if alone else names)
            for number, (scheme, names) in enumerate(by_scheme.items())
        }
        settings: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": MIXED if len(forms) > 1 else next(iter(forms)),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*described.floats, *(pattern for pattern, scheme in patterns if scheme is None)],
            "kv_cache_scheme": None,
        }
        if described.rotations:
            settings["transform_config"] = transform_config(described)
            return {"quantization_config": settings}
        if _dequantized(described):
            settings["dequantize"] = True  # transformers loads these in any dtype this way alone; vLLM ignores the key
        return {"quantization_config": settings}

    def shared_tensors(self, described: Described) -> dict[str, torch.Tensor]:
        return rotation_matrices(described)

    def readers(self, described: Described) -> list[str]:
        if described.rotations:
            return ["vLLM alone, on one GPU"]
        more = ["transformers with compressed-tensors"] if self.transformers_reads(described) else []
        return ["vLLM", "SGLang", *more]

    def transformers_reads(self, described: Described) -> bool:
        why = described.rotations or self._why_of_experts(described)
        return not (why or (described.mixed and _has_zeros(described)))

    def _why_of_experts(self, described: Described) -> str:
        """Return why transformers does not load the experts, "" where it does."""
        found = described.expert_schemes
        if len(found - {None}) > 1:
            return "transformers loads all experts by one scheme, and these have several"
        if None in found and described.splits_floats:  # it takes single ones for packed
            return "transformers loads experts that are floats from --to compressed-tensors alone"
        if any(scheme is not None and scheme.code == NVFP4 for scheme in found):
            return "transformers drops a factor of the scales of experts in NVFP4, so do not load these there"
        return ""

    def notes(self, described: Described) -> list[str]:
        odd = sorted({scheme.bits for scheme in described.all_schemes if scheme.code == "uniform"} - EVERYWHERE)
        widths = f"vLLM runs codes of {', '.join(map(str, odd))} bits by its Humming kernels alone, on NVIDIA GPUs"
        return [*self._notes_of_transformers(described), *([widths] if odd else [])]

    def _notes_of_transformers(self, described: Described) -> list[str]:
        if described.rotations:
            return [
                f"vLLM rotates the inputs of {plural(len(described.rotations), 'layer')} while it runs, on one GPU; "
                "transformers does not, and refuses the folder"
            ]
        if why := self._why_of_experts(described):
            return [why]
        if described.mixed and _has_fp4(described) and described.settings.get("dtype") != "bfloat16":
            return ["transformers unpacks 4-bit floats into bfloat16, so load the model in that dtype there"]
        if not _has_zeros(described):
            return []
        if described.mixed:
            return ["transformers loads no checkpoint with zero points and several widths or group sizes; vLLM does"]
        return ["transformers makes floats of all weights while it loads, as it does with zero points; vLLM does not"]


def _has_fp4(described: Described) -> bool:
    return any(scheme.code in FP4 for scheme in described.all_schemes)


def _dequantized(described: Described) -> bool:
    """Return whether transformers is to make floats while it loads: by one scheme, it cannot do so by several."""
    return not described.mixed and (_has_zeros(described) or _has_fp4(described))


def _has_zeros(described: Described) -> bool:
    return not all(scheme.symmetric for scheme in described.all_schemes)


def _form(scheme: Scheme) -> str:
    small = SMALL_FLOATS.get(scheme.code)
    return FORMAT if small is None else small.form


def _weights(scheme: Scheme) -> dict[str, Any]:
    if scheme.code in SMALL_FLOATS:
        return SMALL_FLOATS[scheme.code].weights
    whole = scheme.group_size == -1
    strategy = {"strategy": "channel" if whole else "group", "group_size": None if whole else scheme.group_size}
    return {"num_bits": scheme.bits, "type": "int", **strategy}


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": _form(scheme),
        "weights": {**_weights(scheme), "symmetric": scheme.symmetric, "dynamic": False, "actorder": None},
        "input_activations": None,
        "output_activations": None,
    }
