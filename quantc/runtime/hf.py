"""The only file that faces transformers' quantizer interface: how `from_pretrained` loads a quantc checkpoint.

Whoever imports transformers where quantc is installed imports this (startup.py), so what takes long to import waits for
the first checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.integrity import METHOD, REMEDY, WEIGHTS_KEY
from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..checkpoint.reader import CheckpointReader


class QuantcConfig(QuantizationConfigMixin):
    """`quantization_config` of a quantc checkpoint; see docs/format.md."""

    def __init__(
        self,
        version: int = 0,
        default: Any = None,
        modules: Any = None,
        residual_rotation: Any = None,
        sha256: Any = None,
        **_: Any,
    ):
        self.quant_method: Any = METHOD
        self.version = version
        self.default = default
        self.modules = modules
        if residual_rotation is not None:
            self.residual_rotation = residual_rotation
        if sha256 is not None:
            self.sha256 = sha256


class QuantcQuantizer(HfQuantizer):
    """Checks the files and puts packed modules into a model on the meta device; transformers fills their buffers."""

    requires_calibration = True
    _reader: CheckpointReader | None = None  # while weights are loaded that transformers opens itself

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        from ..checkpoint.config import read_residual_rotation
        from .model_check import check_entries, check_tensors, reader_of
        from .modules import install

        config = {"quantization_config": self.quantization_config.to_dict()}
        reader = reader_of(checkpoint_files, config)
        check_entries(model, reader.entries)
        install(model, reader.entries, read_residual_rotation(config))
        check_tensors(model, reader)
        self._reader = reader if checkpoint_files is not None else None
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._reader is not None:
            self._reader.check_unchanged()
        from .model_methods import extend
        from .plugin import register_with_others

        extend(type(model))
        register_with_others()  # with peft, if it was only half imported when quantc was
        self._reader = None  # the model holds on to this object, and open files can be neither copied nor pickled
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Return the config without what makes transformers refuse the weights; it comes here before they are found."""
        if getattr(config, WEIGHTS_KEY, None) == REMEDY:
            delattr(config, WEIGHTS_KEY)
        return config

    update_tp_plan = update_ep_plan = update_attn_implementation  # where it comes in transformers before 5.19

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        """Return nothing to convert: the checkpoint has the model's own names already."""
        return []

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of packed weights are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from .modules import unpack

        if hasattr(self.quantization_config, "residual_rotation"):
            raise CheckpointError(
                "this checkpoint's weights belong to rotated hidden states, so that without quantc, which rotates "
                "them, the unpacked model would be wrong; use quantc.runtime.modules.unpack and keep it in memory."
            )
        return unpack(model, dtype or torch.float32)


def register() -> None:
    """Tell transformers about the method "quantc"; calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(QuantcConfig)
        register_quantizer(METHOD)(QuantcQuantizer)
