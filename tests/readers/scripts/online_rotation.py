"""vLLM's online rotations on a CPU: its choice of product asks their module for a linear layer's, which it has not.

It also remembers by address which matrices it has scaled, and a second model in a process may have one at the same.
"""

from __future__ import annotations

from torch.nn import functional as F
from vllm.model_executor.layers.quantization.compressed_tensors.transform import module


def install() -> None:
    """Let rotations multiply as torch does, and forget the matrices of earlier models."""
    module.dispatch_unquantized_gemm = lambda: lambda layer, x, weight, bias: F.linear(x, weight, bias)
    module.HadamardTransform.scaled_data_ptrs.clear()
