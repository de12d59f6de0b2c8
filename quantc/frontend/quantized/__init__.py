"""Folders that other tools have quantized: one file for each container, and what they have in common.

To add one, write its file with a class that is `register`ed, import it here, and write files of it in
tests/quantc/frontend/quantized.
"""

from . import auto_round, awq, compressed_tensors, fp8, gptq, mxfp4
from .base import CONTAINERS, Container, Packed, register
from .find import find_container
from .stored import Stored
from .weights import QuantizedWeights, open_quantized

__all__ = [
    "CONTAINERS",
    "Container",
    "Packed",
    "QuantizedWeights",
    "Stored",
    "auto_round",
    "awq",
    "compressed_tensors",
    "find_container",
    "fp8",
    "gptq",
    "mxfp4",
    "open_quantized",
    "register",
]  # fmt: skip
