"""Scales as they are stored: values of float16, or those of them that bfloat16 has too.

A runtime that keeps scales in bfloat16 then reads them as they are. bfloat16 has 8 digits: every one of its values from
2^-17 on is a float16, and so is every float16 below that a bfloat16.
"""

from __future__ import annotations

import torch

from ...spec import ScaleDtype

SMALLEST_SCALE = 2.0**-24  # the least positive float16
SMALLEST_NORMAL = 2.0**-14  # below it float16 has steps of SMALLEST_SCALE
LARGEST_SCALE = 65504.0
LARGEST: dict[ScaleDtype, float] = {"float16": LARGEST_SCALE, "bfloat16": 65280.0}


def to_stored(scales: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """Return float32 scales as float16, at the nearest value that the dtype has; infinite past the largest."""
    return (scales.to(torch.bfloat16) if dtype == "bfloat16" else scales).to(torch.float16)


def within_range(scales: torch.Tensor, dtype: ScaleDtype) -> torch.Tensor:
    """Return float32 scales as float16, the largest or the smallest in place of what is out of range; 0 stays."""
    stored = to_stored(scales.clamp(-LARGEST[dtype], LARGEST[dtype]), dtype)
    least = torch.full_like(scales, SMALLEST_SCALE).copysign(scales).to(torch.float16)
    return torch.where((stored == 0) & (scales != 0), least, stored)
