"""Packed embedding tables and heads that become floats, since their rows are to change or to be trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..checkpoint.config import checksum_of_settings
from .layers import PackedWeight
from .modules import unpack_parameter

log = logging.getLogger(__name__)


def unpack_tables(model: Any) -> None:
    """Put floats of the model's dtype in place of its packed embedding and head; does nothing where neither is packed.

    Tied ones stay tied. `save_pretrained` writes the floats, and config.json then says that they are not packed.
    """
    owners = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(table) for owner in owners if isinstance(table := getattr(owner, "weight", None), PackedWeight)}
    found = [(name, module) for name, module in model.named_modules() if id(module) in tables]
    for name, table in found:
        unpack_parameter(model, name, table, table.dtype)
    if found:
        _forget(model, {name for name, _ in found})
        size = sum(model.get_parameter(name).nbytes for name, _ in found)
        log.warning("%s unpacked into floats (%.1f MB)", " and ".join(name for name, _ in found), size / 1e6)


def would_resize(model: Any, new_num_tokens: Any = None, pad_to_multiple_of: Any = None, *_: Any, **__: Any) -> bool:
    """Return whether `resize_token_embeddings` with these arguments changes the number of rows."""
    rows = _rows(model.get_input_embeddings())
    wanted = rows if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int):
        wanted += -wanted % pad_to_multiple_of
    return bool(wanted != rows)


def _rows(embedding: nn.Module) -> int:
    weight: torch.Tensor | PackedWeight = embedding.weight  # type: ignore[assignment]
    return weight.shape[0]


def _forget(model: Any, names: set[str]) -> None:
    """Take weights out of the `quantization_config` that belongs to the model."""
    held = (
        getattr(model.config, "quantization_config", None),
        getattr(model.hf_quantizer, "quantization_config", None),
    )
    for settings in {id(each): each for each in held if each is not None}.values():
        settings.modules = {name: entry for name, entry in settings.modules.items() if name not in names}
        if hasattr(settings, "sha256"):
            settings.sha256 = checksum_of_settings(settings.to_dict())
