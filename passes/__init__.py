"""The passes, one file each; importing this package registers them."""

from . import allocate, compensate, importance, quantize, rotate, scale

__all__ = ["allocate", "compensate", "importance", "quantize", "rotate", "scale"]
