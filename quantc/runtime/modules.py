"""Packed layers in a model: put in place of its weights, and unpacked into floats again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint.config import PackedEntry, ResidualRotation
from ..errors import CheckpointError
from ..formats import DENSE, format_of
from .layers import PackedWeight, QuantLinear
from .residual_hooks import attach


def install(model: nn.Module, entries: dict[str, PackedEntry], residual: ResidualRotation | None = None) -> nn.Module:
    """Put packed modules, on the meta device, in place of the model's weights; returns the model.

    residual: the rotation of the hidden states that the weights were made for.

    Raises CheckpointError when the model has no such weight or it has another shape.
    """
    for name, entry in entries.items():
        parent_name, _, leaf = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            target = getattr(parent, leaf)
        except AttributeError as error:
            raise CheckpointError(
                f"the checkpoint packs {name}, but {type(model).__name__} has no such weight; config.json does not "
                "belong to these weights, or this transformers builds the model differently."
            ) from error
        if isinstance(target, nn.Module):
            bias = getattr(target, "bias", None)
            _check_shape(name, _linear_shape(target), entry.shape)
            setattr(parent, leaf, QuantLinear(entry.spec, entry.shape, bias, target.get_parameter("weight").dtype))
        else:
            _install_parameter(model, name, target, entry)
    if residual is not None:
        attach(model, residual)
    return model


def unpack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model with float weights of a dtype in place of every packed one; needs the memory of all of them."""
    for name, module in list(model.named_modules()):
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(module, QuantLinear):
            setattr(parent, leaf, _dense(module, dtype))
        elif isinstance(module, PackedWeight):
            unpack_parameter(model, name, module, dtype)
    return model


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return dense


def unpack_parameter(model: Any, name: str, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Put floats of a dtype in place of a model's packed weight of this name, and of those that are tied to it."""
    weight = packed.dequantize(dtype)
    parameter = nn.Parameter(weight.transpose(-1, -2) if packed.transposed else weight, requires_grad=False)
    parent, _, leaf = name.rpartition(".")
    for path, owner in model.named_modules():
        if path == parent or owner.__dict__.get(leaf) is packed:
            owner.__dict__.pop(leaf, None)
            owner._modules.pop(leaf, None)
            owner.register_parameter(leaf, parameter)
            if path != parent:
                _tie(model, f"{path}.{leaf}", name)


def _tie(model: Any, target: str, source: str) -> None:
    """Tell transformers again what `_share` has told it not to look after."""
    model.all_tied_weights_keys[target] = source
    if model.__dict__.get("_tied_weights_keys", False) is None:
        del model._tied_weights_keys  # the class has them


def _install_parameter(model: Any, name: str, parameter: torch.Tensor, entry: PackedEntry) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    _check_shape(name, tuple(parameter.shape), entry.model_shape)
    if not entry.leading and format_of(entry.spec) is not DENSE:
        raise CheckpointError(
            f"the checkpoint packs {name} as {format_of(entry.spec).name}, but a table is read row by row, which needs "
            f"{DENSE.name}; quantize it again."
        )
    packed = PackedWeight(parameter, entry)
    del parent._parameters[leaf]
    setattr(parent, leaf, packed)
    if entry.leading:
        # The model's own loop over experts indexes the stack; grouped products would need it unpacked.
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = "eager"
    _share(model, name, packed)


def _share(model: Any, name: str, packed: PackedWeight) -> None:
    """Let tensors that are tied to `name`, such as the head's, read the same packed table.

    They are set past nn.Module, so that the state dict holds the table once, and transformers is told that there
    is nothing left to tie.
    """
    targets = [target for target, source in model.all_tied_weights_keys.items() if source == name]
    for target in targets:
        owner_name, _, leaf = target.rpartition(".")
        owner = model.get_submodule(owner_name)
        owner._parameters.pop(leaf, None)
        object.__setattr__(owner, leaf, packed)
        del model.all_tied_weights_keys[target]
    if targets:
        model._tied_weights_keys = None


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _check_shape(name: str, found: tuple[int, ...], packed: tuple[int, ...]) -> None:
    if found != packed:
        raise CheckpointError(
            f"the checkpoint packs {name} as {packed}, but config.json describes a weight of {found}; "
            "the two do not belong together."
        )
