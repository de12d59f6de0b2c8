"""The decoder blocks of a model, and the model run around them.

A sweep never runs the whole model. It runs the model once per batch with the blocks taken out, which yields
what every block is called with (masks, rotary tables, ...), and then runs the blocks one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .carry import Arguments, Carry, Place


@dataclass(frozen=True)
class Returns:
    """How a block returns its hidden state: alone (position None), or in a tuple at a position.

    carry: the layout in rows of what blocks hand on, where it is more than a hidden state (samples, T, ...).
    """

    position: int | None
    rest: tuple[Any, ...] = ()
    carry: Carry | None = None

    def wrap(self, state: torch.Tensor) -> Any:
        """Return what the block would return for an output state (samples, T, ...)."""
        hidden = state if self.carry is None else self.carry.hidden_of(state)
        if self.position is None:
            return hidden
        return (*self.rest[: self.position], hidden, *self.rest[self.position + 1 :])

    def unwrap(self, output: Any, call: BlockCall) -> torch.Tensor:
        """Return the state (samples, T, ...) after a block, from what a call of it returned and left in arguments."""
        hidden = output if self.position is None else output[self.position]
        return hidden if self.carry is None else self.carry.pack(hidden, call.arguments)


@dataclass(frozen=True)
class BlockCall:
    """What the model calls a block with; `place` is the position or keyword of the hidden state.

    carry: see Returns. A call with one is used once: what the block leaves in its arguments stays there.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: Place
    carry: Carry | None = None

    @property
    def arguments(self) -> Arguments:
        """The arguments by position and keyword."""
        places: list[tuple[Place, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return dict(places)

    @property
    def hidden(self) -> torch.Tensor:
        """The state (samples, T, ...) before the block, all that blocks hand on."""
        hidden = self.arguments[self.place]
        return hidden if self.carry is None else self.carry.pack(hidden, self.arguments)

    def with_hidden(self, state: torch.Tensor | None) -> BlockCall:
        """Return the call for another state (samples, T, ...), or without one."""
        arguments = self.arguments
        if state is not None and self.carry is not None:
            arguments = self.carry.restore(state, arguments)
            state = self.carry.hidden_of(state)
        arguments[self.place] = state
        args = tuple(arguments[at] for at in range(len(self.args)))
        return replace(self, args=args, kwargs={name: arguments[name] for name in self.kwargs})

    def run(self, block: nn.Module) -> Any:
        return block(*self.args, **self.kwargs)


OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # what torch says of GPUs and of CPUs

BlockHandler = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def blocks_replaced(blocks: list[nn.Module], handler: BlockHandler) -> Iterator[None]:
    """Call `handler(i, args, kwargs)` in place of the first call of block i; the handler may run the block."""

    def replacement(index: int, *args: Any, **kwargs: Any) -> Any:
        del blocks[index].forward
        return handler(index, args, kwargs)

    for index, block in enumerate(blocks):
        block.forward = partial(replacement, index)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextlib.contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run a model inside, without gradients; what it cannot do with tokens alone becomes a ModelError."""
    try:
        with torch.no_grad():
            yield
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise ModelError(
            f"{type(model).__name__} failed on tokens alone ({type(error).__name__}: {_one_line(error)}); "
            "quantc needs a decoder that runs on input_ids."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _LastBlockReached(Exception):
    """Ends a forward pass early: nothing after the blocks is needed."""


def run_around_blocks(
    model: nn.Module,
    blocks: list[nn.Module],
    tokens: torch.Tensor,
    run_block: Callable[[int, BlockCall], Any],
) -> None:
    """Run the model on tokens (B, T) up to its last block, with `run_block(i, call)` in place of block i.

    What run_block returns is what the model receives from that block. Raises ModelError when the blocks are not
    called once each in order, each on what the one before returned: then they cannot be run one by one.
    """
    state = _Chain(blocks, run_block)
    with running(model), blocks_replaced(blocks, state), contextlib.suppress(_LastBlockReached):
        model(input_ids=tokens, use_cache=False)
    if state.next_index < len(blocks):
        raise ModelError(
            f"{type(model).__name__} called only {state.next_index} of its {len(blocks)} blocks on a probe of tokens, "
            f"no {type(blocks[state.next_index]).__name__} after them; quantc needs a model that runs its blocks one "
            "after another."
        )


class _Chain:
    """Follows the hidden state from block to block."""

    def __init__(self, blocks: list[nn.Module], run_block: Callable[[int, BlockCall], Any]):
        self.blocks, self.run_block = blocks, run_block
        self.next_index = 0
        self.returned: list[torch.Tensor] = []

    def __call__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index != self.next_index:
            due = type(self.blocks[self.next_index]).__name__
            raise ModelError(
                f"{type(self.blocks[index]).__name__} number {index} was called when number {self.next_index} was "
                f"due, a {due} that tokens alone may not reach; quantc needs a model that runs its blocks once each, "
                "in order."
            )
        output = self.run_block(index, BlockCall(args, kwargs, self._place(args, kwargs)))
        self.returned = [output] if isinstance(output, torch.Tensor) else [t for t in output if _is_state(t)]
        self.next_index += 1
        if self.next_index == len(self.blocks):
            raise _LastBlockReached
        return output

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Place:
        place = state_place(args, kwargs, self.returned if self.next_index else None)
        if place is not None:
            return place
        raise ModelError(
            f"block {self.next_index} does not receive what block {self.next_index - 1} returned: the model computes "
            "something between its blocks, and quantc can only run blocks that follow each other directly."
        )


def state_place(args: tuple[Any, ...], kwargs: dict[str, Any], among: list[torch.Tensor] | None = None) -> Place | None:
    """Return the position or keyword of the first argument that looks like a hidden state, and is one of `among`."""
    places: list[tuple[Place, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if _is_state(value) and (among is None or any(_same(value, other) for other in among)):
            return place
    return None


def _is_state(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def describe_return(output: Any, hidden: torch.Tensor) -> Returns:
    """Return how `output`, returned for a hidden state, carries the next hidden state."""
    if isinstance(output, torch.Tensor):
        return Returns(None)
    for position, value in enumerate(output):
        if isinstance(value, torch.Tensor) and value.shape == hidden.shape:
            return Returns(position, tuple(None if index == position else v for index, v in enumerate(output)))
    raise ModelError(
        "a block returns no tensor of its hidden state's shape; quantc needs blocks that hand one to the next."
    )
