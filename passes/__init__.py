"""The passes, one file each; importing this package registers them."""

from . import allocate, quantize, rotate

__all__ = ["allocate", "quantize", "rotate"]
