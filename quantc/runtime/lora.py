"""LoRA on a packed linear. Importing this imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from ..errors import UsageError
from .layers import QuantLinear

STARTS = (True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: the others start from float weights


class PackedLora(Linear):
    """y = base(x) + s B A x, where base is packed and stays so; A and B are what peft's own layer makes of them."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = False  # a packed weight is (N, K) whatever the layer was before

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
        try:
            return super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise UsageError(
                f"the LoraConfig asks for a variant of LoRA ({error}), but packed linears take plain LoRA only; leave "
                "the variant out."
            ) from error

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; raises UsageError where it would start from the values of the weight, or change them."""
        start = getattr(kwargs.get("config"), "init_lora_weights", True)
        if start not in STARTS:
            raise UsageError(
                f"init_lora_weights is {start!r}, which changes the weight, and this one is packed; use True, "
                "'gaussian' or 'orthogonal'."
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into a base that has been unpacked; raises UsageError for a packed one."""
        base = self.get_base_layer()
        if isinstance(base, QuantLinear):
            raise UsageError(
                f"an adapter cannot be merged into weights in {base.spec.label()}, which would round it away; load it "
                "beside the packed model, or call quantc.runtime.modules.unpack(model, torch.float32) first."
            )
        super().merge(safe_merge, adapter_names)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_features, module.out_features

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to where the codes are: `weight` of a packed linear is a stand-in without values."""
        base = self.get_base_layer()
        place = base.get_buffer("qweight").device if isinstance(base, QuantLinear) else None
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or place)
