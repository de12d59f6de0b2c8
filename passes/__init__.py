"""The passes, one file each; importing this package registers them."""

from . import allocate, compensate, distill, group_channels, importance, quantize, rotate, scale, sparsify, tune

__all__ = [
    "allocate",
    "compensate",
    "distill",
    "group_channels",
    "importance",
    "quantize",
    "rotate",
    "scale",
    "sparsify",
    "tune",
]
