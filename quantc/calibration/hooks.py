"""Observers of a running block: they see the rows that each linear, and each expert of a stack, multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..graph.model_graph import Activation, Block, Linear
from ..graph.modules import StackTable
from ..graph.tracer import MATRIX_PRODUCTS

RowHandler = Callable[[str, int, torch.Tensor], None]


@contextlib.contextmanager
def observed(
    module: nn.Module, block: Block, activations: list[Activation], handle: RowHandler, to_the_end: bool = False
) -> Iterator[None]:
    """Call `handle(label, expert, rows)` with the rows (M, K) of each activation while the block runs inside.

    `expert` is 0 for plain linears. Unless it is to run to the end, a pass through the block stops as soon as the last
    of the activations has been seen, where that can be known. All hooks are gone afterwards.
    """
    linears = {linear.name: linear for linear in block.linears}
    stacks = [reader for item in activations for reader in item.readers if linears[reader].kind == "stack"]
    watched = [item for item in activations if linears[item.readers[0]].kind != "stack"]
    last = None if to_the_end or stacks or not watched else _last_called(block, watched)
    hooks = [_hook(module, block, item, handle, item is last) for item in watched]
    try:
        if stacks:
            with StackObserver(module, block, [linears[name] for name in stacks], handle):
                yield
        else:
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_called(block: Block, watched: list[Activation]) -> Activation | None:
    """Return the activation seen last in a pass, when the trace reached all (uncalled experts may come later)."""
    if any(item.order < 0 for item in watched):
        return None
    return max(watched, key=lambda item: item.order)


def _hook(module: nn.Module, block: Block, item: Activation, handle: RowHandler, last: bool) -> Any:
    def before_forward(_: nn.Module, args: tuple[Any, ...]) -> None:
        handle(item.label, 0, args[0].reshape(-1, item.width))
        if last:
            raise EnoughSeen

    reader = module.get_submodule(block.inside(item.readers[0]))
    return reader.register_forward_pre_hook(before_forward)


class StackObserver(TorchFunctionMode):
    """Sees the rows of every expert: matrix products whose weight is a slice of a stacked parameter."""

    def __init__(self, module: nn.Module, block: Block, stacks: list[Linear], handle: RowHandler):
        super().__init__()
        self._table = StackTable(module)
        self._stacks = {block.inside(linear.name): linear for linear in stacks}
        self._handle = handle

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__name__", "") in MATRIX_PRODUCTS and len(args) >= 2:
            use = self._table.find(args[1])
            if use is not None and use.name in self._stacks:
                self._notice(self._stacks[use.name], use.expert, args[0])
        return func(*args, **(kwargs or {}))

    def _notice(self, linear: Linear, expert: int | None, rows: torch.Tensor) -> None:
        width = linear.shape[1]
        if expert is not None:
            self._handle(linear.reads, expert, rows.reshape(-1, width))
            return
        for index, part in enumerate(rows):
            # Experts that a token was not routed to receive zeros in a batched product: those rows say nothing.
            part = part.reshape(-1, width)
            self._handle(linear.reads, index, part[part.abs().amax(1) > 0])


class EnoughSeen(Exception):
    """Raised by an observer that needs nothing more of this forward pass."""
