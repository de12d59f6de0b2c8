"""The precision of matrix products in passes over the calibration set."""

from __future__ import annotations

import torch

from ..machine.compute_dtype import has_fast_bfloat16


def product_dtype(device: torch.device, wanted: bool = True) -> torch.dtype:
    """Return the dtype in which `fast_matmul` multiplies: weights in it are not copied."""
    return torch.bfloat16 if wanted and has_fast_bfloat16(device) else torch.float32


def fast_matmul(device: torch.device, wanted: bool = True) -> torch.autocast:
    """Return the context for calibration passes: products in bfloat16 where wanted and native, the rest in float32.

    On SmolLM2-135M at 3 bits it takes a third off the CPU seconds and moves the mean output error of the linears
    from 0.009589 to 0.009593: bfloat16's 2^-9 drowns in the rounding error of the weights. In that of 8 bits it does
    not: correction then takes it for a change of the inputs (qwen3_next: logits off by 3.6 % instead of 1.5 %).
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=product_dtype(device, wanted) == torch.bfloat16)
