"""GPTQ's container, as AutoGPTQ and GPTQModel define it, with the groups along inputs in their order.

Version 1 stores zero points less one, so that it has none for a zero point of 0: it is written for symmetric codes
alone, and version 2 (`gptq_v2`), which stores them as they are, for the others.
"""

from __future__ import annotations

from re import escape
from typing import Any

import torch

from ...numerics.qtensor import QTensor
from ...version import __version__
from .base import Described, FolderContainer, Scheme, zero_codes
from .places import STACKED_LEAVES
from .words import columns_in_words, rows_in_words

VLLM_BITS = (4, 8)  # of symmetric codes


class Gptq(FolderContainer):
    """Words along the inputs, one column an output."""

    name = "gptq"

    def parts(self, tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return gptq_parts(tensor, less_one=tensor.zeros is None)

    def config(self, described: Described) -> dict[str, Any]:
        return {"quantization_config": _settings(described)}

    def files(self, described: Described) -> dict[str, Any]:
        return {"quantize_config.json": _settings(described)}

    def readers(self, described: Described) -> list[str]:
        whole = all(scheme.symmetric and scheme.bits in VLLM_BITS for scheme in described.all_schemes)
        through = [] if described.mixed else ["transformers with GPTQModel"]
        return [*known_readers(described, through), *(["vLLM"] if whole else [])]

    def notes(self, described: Described) -> list[str]:
        found = []
        if described.mixed:
            found.append("GPTQModel and vLLM load several widths or group sizes (`dynamic`), transformers does not")
        if not described.common.symmetric:
            found.append("vLLM loads no GPTQ checkpoint with zero points; --to awq or compressed-tensors is for it")
        return found + notes_of_experts(described)


def known_readers(described: Described, others: list[str]) -> list[str]:
    """Return GPTQModel where it finds the experts, and others where there are none."""
    leaves = {leaf for experts in described.experts for leaf in experts.schemes}
    return ["GPTQModel", *([] if leaves else others)] if leaves <= set(STACKED_LEAVES.values()) else []


def notes_of_experts(described: Described) -> list[str]:
    """Return who reads the experts of GPTQ's and AWQ's containers; tried with GPTQModel 7.6 and transformers 5.23."""
    leaves = {leaf for experts in described.experts for leaf in experts.schemes}
    if not leaves:
        return []
    if leaves <= set(STACKED_LEAVES.values()):
        return ["GPTQModel itself reads the experts; transformers with GPTQModel does not, and draws them at random"]
    unknown = min(leaves - set(STACKED_LEAVES.values()))
    return [f"GPTQModel and transformers with it do not find experts with a matrix {unknown}, and draw them at random"]


def gptq_parts(tensor: QTensor, less_one: bool) -> dict[str, torch.Tensor]:
    """Return the four tensors; less_one: store zero points less one."""
    bits, k = tensor.spec.bits, tensor.shape[1]
    zeros = zero_codes(tensor)
    if less_one:
        zeros = zeros - 1 & (1 << bits) - 1
    group = tensor.spec.group_length(tensor.shape)
    return {
        "qweight": columns_in_words(tensor.codes.T.contiguous(), bits),
        "qzeros": rows_in_words(zeros.T.contiguous(), bits),
        "scales": tensor.scales.T.contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32) // group,
    }


def _settings(described: Described) -> dict[str, Any]:
    common = described.common
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": common.bits,
        "group_size": common.group_size,
        "sym": common.symmetric,
        "desc_act": False,  # groups are in the order of inputs, whatever order they were rounded in
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if common.symmetric else "gptq_v2",
    }
    if not common.symmetric:
        settings["meta"] = {"quantizer": [f"quantc:{__version__}"]}
    dynamic = dict(_rule(f"{escape(name)}$", scheme) for name, scheme in described.others.items())
    for experts in described.experts:
        dynamic |= dict(_rule(*pair) for pair in experts.patterns() if pair[1] != common)
    dynamic |= dict(_rule(f"{escape(name)}$", None) for name in described.inner_floats)
    if dynamic:
        settings["dynamic"] = dynamic
    return settings


def _rule(pattern: str, scheme: Scheme | None) -> tuple[str, dict[str, Any]]:
    """Return an entry of `dynamic` for the modules that an expression matches."""
    if scheme is None:
        return f"-:^{pattern}", {}
    return f"+:^{pattern}", {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
