"""Rotates the hidden states of a model in vLLM between the two blocks that a checkpoint names.

A layer says its own name when it is built. From there the way goes up, module by module, to the block that has it.

A block of vLLM takes and returns the hidden state in two parts whose sum it is, so each of them is rotated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...checkpoint.config import ResidualRotation
from ...errors import CheckpointError
from ..residual_hooks import turn


class BlockRotation:
    """rotation: by the names of the checkpoint, until `rename` is told those of the model."""

    def __init__(self, rotation: ResidualRotation):
        self.rotation = rotation
        self._above: dict[nn.Module, tuple[str, list[str]]] = {}  # a module -> its block, the names from there to it
        self._hooked: set[str] = set()

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Take the model's names of the blocks; raises CheckpointError for a block that it leaves out."""

        def renamed(block: str) -> str:
            if (new := new_name(f"{block}.")) is None:
                raise CheckpointError(f"vLLM's model has no {block}, where hidden states rotate; use quantc.load.")
            return new.removesuffix(".")

        self.rotation = replace(self.rotation, first=renamed(self.rotation.first), last=renamed(self.rotation.last))

    def saw(self, layer: nn.Module, name: str) -> None:
        """Take note of a layer that is being built, if it is inside one of the blocks."""
        for block in {self.rotation.first, self.rotation.last} - self._hooked:
            if name.startswith(f"{block}."):
                self._above[layer] = (block, name.removeprefix(f"{block}.").split("."))

    def registered(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Take one step up if the module is on the way to a block, and rotate at the block."""
        block, path = self._above.pop(module, ("", []))
        if not path or path[-1] != name or block in self._hooked:
            return
        if len(path) > 1:
            self._above[parent] = (block, path[:-1])
            return
        self._hooked.add(block)
        if block == self.rotation.first:
            parent.register_forward_pre_hook(partial(_turn_input, self.rotation), with_kwargs=True)
        if block == self.rotation.last:
            parent.register_forward_hook(partial(_turn_output, self.rotation))

    def check(self, first: bool, last: bool) -> None:
        """Raise CheckpointError unless the first and the last block, where this process has them, were found."""
        self._above.clear()
        for wanted, name in ((first, self.rotation.first), (last, self.rotation.last)):
            if wanted and name not in self._hooked:
                raise CheckpointError(
                    f"the checkpoint rotates hidden states at {name}, but vLLM's model has no such block; quantize the "
                    "model again with --preset fast, or with a recipe without rotate."
                )


def _turn_input(
    rotation: ResidualRotation, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _turned(rotation, args, False), {name: _turned_one(rotation, value, False) for name, value in kwargs.items()}


def _turn_output(rotation: ResidualRotation, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _turned(rotation, output, True) if isinstance(output, tuple) else _turned_one(rotation, output, True)


def _turned(rotation: ResidualRotation, values: tuple[Any, ...], back: bool) -> tuple[Any, ...]:
    return tuple(_turned_one(rotation, value, back) for value in values)


def _turned_one(rotation: ResidualRotation, value: Any, back: bool) -> Any:
    state = isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1:] == (rotation.width,)
    return turn(value, rotation.order, back) if state else value
