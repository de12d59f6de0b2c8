"""What vLLM calls in each of its processes: the entry point `vllm.general_plugins` of setup.py names it."""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about the quantization method "quantc"; calling it again does nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from ...checkpoint.integrity import METHOD
    from .config import QuantcConfig

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(QuantcConfig)
