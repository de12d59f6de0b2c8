"""A kernel for packed linears in vLLM's CPU build: the floats of the weight, times the input, in float32.

Its own has 4 bits alone, in bfloat16, and needs AVX-512; other widths run on GPUs. With this one all of its reading
can be tried on any processor: names, schemes, fused linears, slices.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.platforms import PlatformEnum


class DenseKernel(MPLinearKernel):
    """Codes of any width along the inputs, zero points along the outputs, both in dense words of 32 bits."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scales, zeros = self._get_weight_params(layer)
        kind = self.config.weight_type
        k, n = self.config.partition_weight_shape
        codes = unpack(packed.data, kind.size_bits, k)
        zero = float(kind.bias) if zeros is None else unpack(zeros.data.T.contiguous(), kind.size_bits, n).T
        scales = scales.data.float()
        group = k // scales.shape[1]
        if zeros is not None:
            zero = zero.repeat_interleave(group, 1)
        layer.dense = ((codes - zero) * scales.repeat_interleave(group, 1)).to(layer.params_dtype)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, layer.dense, bias)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return float32 (R, count), the codes in int32 words (R, W)."""
    stream = (words[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
    digits = stream.flatten(1)[:, : count * bits].unflatten(1, (count, bits))
    return (digits << torch.arange(bits, dtype=torch.int32)).sum(2).float()


def install() -> None:
    """Let vLLM take the kernel before its own, which computes in bfloat16 alone."""
    _POSSIBLE_KERNELS[PlatformEnum.CPU].insert(0, DenseKernel)
