"""Parts of a quantized model that its original's take the place of, in memory and for a while.

Nothing is copied: the module that is replaced calls its counterpart in the other model. A block can be replaced
whatever was done to its weights, since it computes the same function, in the basis of its hidden states. A single
linear can where its weight is the original's, rounded, also where channels were scaled before: by `scale`, or by AWQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..graph.blocks import BlockCall, describe_return, state_place
from ..runtime.layers import PackedWeight, QuantLinear
from .blocks import Blocks

FIT_ROUNDS = 8
LEAST_SPREAD = 0.1  # of the logarithms of fitted scales: those of weights that were only rounded are 1 within a few %
LEAST_FIT = 0.8  # of the squared difference between the weights may be left by fitted scales
LINEARS = (nn.Linear, Conv1D, QuantLinear)

Forward = Callable[..., Any]
Scales = tuple[torch.Tensor, torch.Tensor]  # of rows (N,) and of columns (K,)


@dataclass(frozen=True)
class Part:
    """Something of a model, by the name it has there, and how the original's takes its place while a context lasts."""

    name: str
    put_back: Callable[[], AbstractContextManager[None]]


@contextmanager
def restored(parts: Iterable[Part]) -> Iterator[None]:
    """Have the original's in place of all these parts; afterwards the model is what it was."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.put_back())
        yield


class Pair:
    """A model and its original, both in memory, with as many blocks."""

    def __init__(self, model: Blocks, original: Blocks):
        self._model, self._original = model, original
        pairs = zip(model.names, model.modules, original.modules, strict=True)
        self.blocks = [
            Part(name, partial(_with_forward, module, partial(_run_block, model, original, theirs)))
            for name, module, theirs in pairs
        ]

    @property
    def outside(self) -> list[Part]:
        """Embedding and head."""
        found = []
        for name, of in (("the embedding", "get_input_embeddings"), ("the head", "get_output_embeddings")):
            ours, theirs = getattr(self._model.model, of)(), getattr(self._original.model, of)()
            if ours is not None and theirs is not None:
                found.append(Part(name, partial(_with_forward, ours, theirs.forward)))
        return found

    @property
    def most_linears(self) -> int:
        """The most linears in any block of the original."""
        return max(sum(isinstance(item, LINEARS) for item in block.modules()) for block in self._original.modules)

    def linears(self, index: int, scaled: bool) -> list[Part]:
        """Return the linears and stacks of experts of a block whose weights differ from the original's.

        scaled: whether scales of channels are looked for, and made up for.
        """
        ours, theirs = (blocks.modules[index] for blocks in (self._model, self._original))
        found = []
        for name, module in theirs.named_modules():
            mine = _submodule(ours, name)
            if isinstance(module, LINEARS) and isinstance(mine, LINEARS):
                found += _linear(f"{self._model.names[index]}.{name}", mine, module, scaled)
        return found + list(_stacks(self._model.names[index], ours, theirs))


def _linear(name: str, ours: nn.Module, theirs: nn.Module, scaled: bool) -> list[Part]:
    weight, original = weight_of(ours), weight_of(theirs)
    if weight.shape != original.shape or torch.equal(weight, original):
        return []
    scales = channel_scales(weight, original) if scaled else None
    forward = theirs.forward if scales is None else partial(_run_scaled, theirs.forward, *scales)
    return [Part(name, partial(_with_forward, ours, forward))]


def _stacks(block: str, ours: nn.Module, theirs: nn.Module) -> Iterator[Part]:
    """Yield the 3-D weights of experts, which the model's code indexes: the attribute itself is replaced."""
    stacks: list[tuple[str, Any]] = [(name, each) for name, each in theirs.named_parameters() if each.ndim == 3]
    packed = (item for item in theirs.named_modules() if isinstance(item[1], PackedWeight))
    stacks += [(name, module) for name, module in packed if len(module.shape) == 3]
    for name, value in stacks:
        owner, _, leaf = name.rpartition(".")
        module = _submodule(ours, owner)
        mine = getattr(module, leaf, None)
        same = isinstance(mine, nn.Parameter) and isinstance(value, nn.Parameter) and torch.equal(mine, value)
        if mine is not None and mine.shape == value.shape and not same:
            yield Part(f"{block}.{name}", partial(_with_attribute, module, leaf, value))


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return the weight of a linear, float32 (N, K), unpacked where it is packed."""
    if isinstance(module, QuantLinear):
        return module.dequantize(torch.float32)
    weight: torch.Tensor = module.weight.detach().float()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def channel_scales(weight: torch.Tensor, original: torch.Tensor) -> Scales | None:
    """Return scales of rows and columns that make a weight (N, K) of the original; None where none are needed.

    Least squares, rows and columns in turn, each of weights whose other scales were taken away, so that large channels
    do not count for more. One factor for all channels is damage, not a rewrite that other weights
    make up for, and so are scales that are not positive.
    """
    rows, columns = torch.ones(weight.shape[0]).to(weight), torch.ones(weight.shape[1]).to(weight)
    for _ in range(FIT_ROUNDS):
        rows = _fit(weight / columns, original, 1)
        columns = _fit(weight / rows[:, None], original, 0)
        if not bool((rows > 0).all() and (columns > 0).all()):
            return None
    spread = max(float(scales.log().std(correction=0)) for scales in (rows, columns))
    left = (weight - rows[:, None] * original * columns).square().sum()
    if spread < LEAST_SPREAD or bool(left > LEAST_FIT * (weight - original).square().sum()):
        return None
    return rows, columns


def _fit(weight: torch.Tensor, original: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the factor of each channel; 1 where the original is zero."""
    squares = original.square().sum(dim)
    return torch.where(squares > 0, (weight * original).sum(dim) / squares, torch.ones_like(squares))


def _run_scaled(forward: Forward, rows: torch.Tensor, columns: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = forward(x * columns.to(x))
    return y * rows.to(y)


def _run_block(model: Blocks, original: Blocks, theirs: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the original's block in a model whose hidden states may be in another basis."""
    if model.rotation is None and original.rotation is None:
        return theirs.forward(*args, **kwargs)
    place = state_place(args, kwargs)
    assert place is not None
    call = BlockCall(args, kwargs, place)
    called = call.with_hidden(original.from_plain(model.to_plain(call.hidden)))
    output = theirs.forward(*called.args, **called.kwargs)
    returns = describe_return(output, called.hidden)
    return returns.wrap(model.from_plain(original.to_plain(returns.unwrap(output, called))))


@contextmanager
def _with_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.forward = before


@contextmanager
def _with_attribute(owner: nn.Module, leaf: str, value: Any) -> Iterator[None]:
    before = getattr(owner, leaf)
    _replace(owner, leaf, value)
    try:
        yield
    finally:
        _replace(owner, leaf, before)


def _replace(owner: nn.Module, leaf: str, value: Any) -> None:
    owner._parameters.pop(leaf, None)
    owner._modules.pop(leaf, None)
    setattr(owner, leaf, value)


def _submodule(block: nn.Module, name: str) -> Any:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None
