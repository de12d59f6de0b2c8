"""Kernels: what multiplies activations with packed weights, chosen by what each one declares it supports."""

from .base import Kernel, Prepared
from .registry import KERNELS, Choice, choose

__all__ = ["KERNELS", "Choice", "Kernel", "Prepared", "choose"]
