"""The panel of columns that weights on a device are rounded by."""

from __future__ import annotations

import torch

from ..numerics.rounding import Panel
from .cpu import rounding as cpu
from .cuda import gptq as cuda


def panel_for(device: torch.device) -> Panel | None:
    """Return the panel for weights on a device; None where torch rounds them all."""
    return cpu.panel() if device.type == "cpu" else cuda.panel_for(device)
