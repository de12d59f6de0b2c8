"""Rotates the hidden states of a loaded model before one block and back after another.

The weights between the two were made for rotated hidden states; what is outside, embeddings and head above all,
was not. A model's own record of hidden states (output_hidden_states) is of the rotated ones.

torch.compile sees an operator: it cannot look into the making of Hadamard matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..checkpoint.config import ResidualRotation
from ..errors import CheckpointError
from ..numerics import residual

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define("turn(Tensor x, int block, bool back) -> Tensor")


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
    """Return the arguments with the hidden state, the first that looks like one, rotated."""
    for place, value in enumerate(args):
        if _is_state(value, rotation):
            return (*args[:place], turn(value, rotation.order, False), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if _is_state(value, rotation):
            return args, {**kwargs, name: turn(value, rotation.order, False)}
    raise CheckpointError(
        f"{type(module).__name__} receives no hidden state of width {rotation.width}, so it cannot be rotated; "
        "config.json does not belong to these weights."
    )


def _turn_output(rotation: ResidualRotation, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output with the hidden state, alone or the first in a tuple that looks like one, rotated back."""
    if isinstance(output, torch.Tensor):
        return turn(output, rotation.order, True)
    for place, value in enumerate(output):
        if _is_state(value, rotation):
            return (*output[:place], turn(value, rotation.order, True), *output[place + 1 :])
    raise CheckpointError(
        f"{type(module).__name__} returns no hidden state of width {rotation.width}, so it cannot be rotated back; "
        "config.json does not belong to these weights."
    )


def turn(x: torch.Tensor, block: int, back: bool) -> torch.Tensor:
    """Rotate hidden states (..., width), or rotate them back, in blocks of this order; dtype kept."""
    if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and x.requires_grad):
        y: torch.Tensor = torch.ops.quantc.turn(x, block, back)
        return y
    return residual.turn_back(x, block) if back else residual.turn(x, block)


@torch.library.impl(LIBRARY, "turn", "CompositeExplicitAutograd")
def _turn_operator(x: torch.Tensor, block: int, back: bool) -> torch.Tensor:
    return turn(x.detach(), block, back)


@torch.library.register_fake("quantc::turn", lib=LIBRARY)
def _fake_turn(x: torch.Tensor, block: int, back: bool) -> torch.Tensor:
    return x.new_empty(x.shape)


def _is_state(value: Any, rotation: ResidualRotation) -> bool:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return is_float and value.ndim >= 3 and value.shape[-1] == rotation.width
