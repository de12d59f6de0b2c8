"""Follows how a model of vLLM is put together.

vLLM tells a quantization method about some layers, never about the model they belong to. torch tells which module is
put into which, so what else has to be found is found while the model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

Listener = Callable[[nn.Module, str, nn.Module], None]


class Construction:
    """listeners: called with parent, name and child for every module that is put into another, once it has started.

    One model only: vLLM asks about layers later too, while others are built, and then `start` does nothing.
    """

    def __init__(self, listeners: Sequence[Listener]):
        self._listeners = listeners
        self._hook: Any = None

    def start(self) -> None:
        """Begin to follow; calling it again does nothing."""
        if self._hook is None:
            self._hook = register_module_module_registration_hook(self._registered)

    def stop(self) -> None:
        """Stop following: the model is built."""
        self._listeners = ()
        if self._hook is not None:
            self._hook.remove()

    def _registered(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            for listener in self._listeners:
                listener(parent, name, module)
