"""Rotates the hidden states of a loaded model before one block and back after another.

The weights between the two were made for rotated hidden states; what lies outside, embeddings and head above all,
was not. A model's own record of hidden states (output_hidden_states) is of the rotated ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from .checkpoint import ResidualRotation
from .errors import CheckpointError
from .numerics.residual import turn, turn_back


def attach(model: nn.Module, rotation: ResidualRotation) -> None:
    """Hook the two blocks that a rotation names; raises CheckpointError when the model has no such modules."""
    try:
        first, last = model.get_submodule(rotation.first), model.get_submodule(rotation.last)
    except AttributeError as error:
        raise CheckpointError(
            f"the checkpoint rotates hidden states from {rotation.first} to {rotation.last}, but "
            f"{type(model).__name__} has no such modules; config.json does not belong to these weights, or this "
            "transformers builds the model differently."
        ) from error
    first.register_forward_pre_hook(partial(_turn_input, rotation), with_kwargs=True)
    last.register_forward_hook(partial(_turn_output, rotation))


def _turn_input(
    rotation: ResidualRotation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the hidden state, the first that looks like one, rotated."""
    for place, value in enumerate(args):
        if _is_state(value, rotation):
            return (*args[:place], turn(value, rotation.order), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if _is_state(value, rotation):
            return args, {**kwargs, name: turn(value, rotation.order)}
    raise CheckpointError(
        f"{type(module).__name__} receives no hidden state of width {rotation.width}, so it cannot be rotated; "
        "config.json does not belong to these weights."
    )


def _turn_output(rotation: ResidualRotation, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output with the hidden state, alone or the first in a tuple that looks like one, rotated back."""
    if isinstance(output, torch.Tensor):
        return turn_back(output, rotation.order)
    for place, value in enumerate(output):
        if _is_state(value, rotation):
            return (*output[:place], turn_back(value, rotation.order), *output[place + 1 :])
    raise CheckpointError(
        f"{type(module).__name__} returns no hidden state of width {rotation.width}, so it cannot be rotated back; "
        "config.json does not belong to these weights."
    )


def _is_state(value: Any, rotation: ResidualRotation) -> bool:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return is_float and value.ndim >= 3 and value.shape[-1] == rotation.width
