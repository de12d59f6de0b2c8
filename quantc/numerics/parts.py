"""The stored tensors of a quantized weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Dtype and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
