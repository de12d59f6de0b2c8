"""One unit for the NVFP4 scales of layers that a runtime multiplies at once: of several it would keep the largest.

Where units are powers of two, scales are as exact in a larger one, but for those below 2^-6 of it, which lose bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from ...errors import UsageError
from ...numerics.qtensor import QTensor
from ...planning.targets import NVFP4
from .fits import fused_layers
from .places import Place

UNIT = "tensor_scale"


def shared_units(places: Iterable[Place], unit_of: Callable[[Place], torch.Tensor], target: str) -> dict[str, float]:
    """Return module -> the unit of the layers that it is fused with, where that is not its own.

    Raises UsageError for units that are no powers of two.
    """
    units = {place.name: float(unit_of(place)) for place in places if place.entry.spec.code == NVFP4}
    shared: dict[str, float] = {}
    for names in fused_layers(units):
        own = {name: units[name] for name in names}
        if len(set(own.values())) > 1:
            if any(torch.frexp(torch.tensor(unit)).mantissa != 0.5 for unit in own.values()):
                raise UsageError(
                    f"{target} multiplies {names[0]} and {names[1].rpartition('.')[2]} at once, and their NVFP4 scales "
                    f"have different units; quantize the model again with --target {target}."
                )
            shared |= {name: max(own.values()) for name, unit in own.items() if unit < max(own.values())}
    return shared


def in_unit(tensor: QTensor, unit: float) -> QTensor:
    """Return an NVFP4 weight with scales in a larger unit."""
    scales = tensor.scales.view(torch.float8_e4m3fn).float() * (float(tensor.more[UNIT]) / unit)
    stored = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    return replace(tensor, scales=stored, more={UNIT: torch.full_like(tensor.more[UNIT], unit)})
