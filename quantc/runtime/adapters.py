"""Adapters of peft on packed models: tells peft of packed linears, without importing it.

peft puts adapters on the layers it knows, and takes others from its configs (`_register_custom_module`). plugin.py
calls the functions here when the modules of peft that they change have been imported, so that every LoraConfig, of a
user or read from an adapter's folder, knows packed linears.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ..errors import UsageError
from .layers import PackedWeight, QuantLinear

ALL = "all-linear"  # as target_modules: peft then takes the linears it knows


def register_lora() -> None:
    """Let every LoraConfig know QuantLinear; calling it again does nothing."""
    from peft.tuners.lora.config import LoraConfig

    kind: Any = LoraConfig
    made = kind.__post_init__
    if hasattr(made, "of_quantc"):
        return

    @wraps(made)
    def make(config: Any) -> None:
        from .lora import PackedLora  # peft is imported as a whole only once somebody makes a config

        made(config)
        config._register_custom_module({QuantLinear: PackedLora})

    make.of_quantc = True  # type: ignore[attr-defined]
    kind.__post_init__ = make


def register_targets() -> None:
    """Let "all-linear" mean packed linears too, and refuse to train copies of what is packed; again does nothing."""
    from peft.tuners import tuners_utils

    resolve = tuners_utils._maybe_include_all_linear_layers
    if hasattr(resolve, "of_quantc"):
        return

    @wraps(resolve)
    def find(peft_config: Any, model: Any) -> Any:
        _refuse_packed_copies(peft_config, model)
        asked = getattr(peft_config, "target_modules", None)
        found: Any = resolve(peft_config, model)
        if isinstance(asked, str) and asked.lower() == ALL:
            found.target_modules = set(found.target_modules) | _packed_linears(model)
        return found

    find.of_quantc = True  # type: ignore[attr-defined]
    tuners_utils._maybe_include_all_linear_layers = find


def _packed_linears(model: Any) -> set[str]:
    """Return the names of packed linears that have no adapter yet, but for the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {name for name, module in linears.items() if module is not head and not name.endswith("base_layer")}


def _refuse_packed_copies(peft_config: Any, model: Any) -> None:
    """Raise UsageError for `modules_to_save` that are packed: peft would train copies of them that have no floats."""
    wanted = tuple(getattr(peft_config, "modules_to_save", None) or ())
    for name, module in model.named_modules():
        if not name.endswith(wanted) or not wanted:
            continue
        if any(isinstance(inside, QuantLinear | PackedWeight) for inside in (module, getattr(module, "weight", None))):
            raise UsageError(
                f"modules_to_save has {name}, which is packed and has no floats to train; call "
                "quantc.runtime.tables.unpack_tables(model) first for an embedding or a head, or name it in "
                "target_modules instead."
            )
