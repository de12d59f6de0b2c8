"""The passes, one file each; importing this package registers them."""

from . import allocate, compensate, quantize, rotate, scale

__all__ = ["allocate", "compensate", "quantize", "rotate", "scale"]
