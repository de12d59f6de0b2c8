"""Derives a ModelGraph by running the model. No table of model names.

One small batch runs through each kind of block on real weights; `tracer.py` watches which tensor every linear
receives and where that tensor came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .blocks import BlockCall, Returns, describe_return, run_around_blocks
from .carry import Carry, Piece, Slot, entry_between, left_behind, snapshot
from .decoder import Free, Load, embedding_of, find_decoder, is_tied, load_outside, name_of, probe_tokens
from .model_graph import Block, Linear, ModelGraph
from .tracer import BlockTracer

PROBE_SHAPES = ((2, 24), (3, 20))  # samples and tokens of the runs: axes that change with them


def derive(model: PreTrainedModel, load: Load, free: Free) -> ModelGraph:
    """Return the graph of a model whose weights are on the meta device.

    load(prefix): gives the parameters under a name their weights; free(module): takes them away again.
    One block of each kind (class, parameter shapes and settings) is loaded at a time; the others pass the hidden state
    on, unless blocks of their kind leave something for later ones. Raises ModelError when the model's blocks cannot be
    found or run one by one.
    """
    embedding = name_of(model, embedding_of(model))
    decoder = find_decoder(model, load, free)
    load_outside(model, decoder.blocks, load, decoder.idle)
    probe = _Probe(model, decoder.blocks, load, free)
    found = probe.run()
    return ModelGraph(
        blocks=_keep_shared(model, found),
        embedding=embedding,
        head=name_of(model, model.get_output_embeddings()),
        tied=is_tied(model),
        idle=decoder.idle,
    )


class _Probe:
    """Runs of the model's blocks on a few tokens."""

    def __init__(self, model: PreTrainedModel, names: list[str], load: Load, free: Free):
        self.model, self.names, self.load, self.free = model, names, load, free
        self.blocks = [model.get_submodule(name) for name in names]
        self.traced: dict[Any, Block] = {}
        self.leaving: dict[Any, bool] = {}  # kind -> whether its blocks leave something for later ones

    def run(self) -> list[Block]:
        """Return the blocks with the layout of what they hand on, found by two runs of different batch shapes."""
        first, second = (self._run_on(shape) for shape in PROBE_SHAPES)
        found = [self._rebased(index) for index in range(len(self.names))]
        hidden = Piece.between(first.hidden, second.hidden, PROBE_SHAPES)
        entries = [entry_between(slot, value, second.left[slot], PROBE_SHAPES) for slot, value in first.left.items()]
        if hidden.axes == (0, 1) and not entries:
            return found
        counts = [sum(writer < index for writer in first.writers.values()) for index in range(len(found))]
        carries = [Carry(hidden, tuple(entries), count) for count in counts]
        return [
            replace(block, returns=replace(block.returns, carry=carry))
            for block, carry in zip(found, carries, strict=True)
        ]

    def _run_on(self, shape: tuple[int, int]) -> _Seen:
        seen = _Seen()
        run_around_blocks(self.model, self.blocks, probe_tokens(self.model, shape), partial(self._run_block, seen))
        return seen

    def _run_block(self, seen: _Seen, index: int, call: BlockCall) -> Any:
        if index == 0:
            seen.hidden = call.hidden
        seen.refuse_returned(call)
        kind = _kind_of(self.blocks[index])
        if kind in self.traced and not self.leaving[kind]:
            return self.traced[kind].returns.wrap(call.hidden)
        before = snapshot(call.arguments)
        self.load(self.names[index])
        if kind in self.traced:
            output = call.run(self.blocks[index])
        else:
            self.traced[kind], output = _trace(self.blocks[index], call)
        self.free(self.blocks[index])
        left = left_behind(before, call.arguments, call.place)
        self.leaving[kind] = self.leaving.get(kind, False) or bool(left)
        seen.note(index, left, self.traced[kind].returns, output)
        return output

    def _rebased(self, index: int) -> Block:
        return _rebase(self.traced[_kind_of(self.blocks[index])], index, self.names[index])


@dataclass
class _Seen:
    """What a run of the blocks has shown: the first hidden state, and what blocks left for later ones."""

    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    left: dict[Slot, Any] = field(default_factory=dict)
    writers: dict[Slot, int] = field(default_factory=dict)  # the first block that left something there
    returned: list[torch.Tensor] = field(default_factory=list)  # besides hidden states

    def note(self, index: int, left: dict[Slot, Any], returns: Returns, output: Any) -> None:
        """Record what a block left and returned."""
        self.left |= left
        self.writers = dict.fromkeys(left, index) | self.writers
        rest = () if returns.position is None else output
        self.returned += [item for at, item in enumerate(rest) if at != returns.position and torch.is_tensor(item)]

    def refuse_returned(self, call: BlockCall) -> None:
        """Raise ModelError when a block receives what an earlier one returned beside the hidden state."""
        for place, value in call.arguments.items():
            if any(value is item for item in self.returned):
                raise ModelError(
                    f"a block receives in its argument {place!r} what an earlier one returned beside the hidden "
                    "state; quantc can only run blocks that hand on one hidden state."
                )


def _kind_of(block: nn.Module) -> Any:
    """Return a key that blocks which compute alike share: class, parameter shapes, and switches and names in them."""
    switches = (
        (name, key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | str)
    )
    return type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()), tuple(switches)


def _trace(block: nn.Module, call: BlockCall) -> tuple[Block, Any]:
    tracer = BlockTracer(block)
    output = tracer.run(call)
    returns = describe_return(output, call.hidden)
    return tracer.block(returns), output


def _rebase(block: Block, index: int, name: str) -> Block:
    """Return the block traced for a kind, with the full names of another block of that kind."""

    def full(relative: str) -> str:
        return f"{name}.{relative}"

    return Block(
        index=index,
        name=name,
        linears=tuple(replace(item, name=full(item.name), reads=full(item.reads)) for item in block.linears),
        norms=tuple(replace(norm, name=full(norm.name)) for norm in block.norms),
        activations=tuple(
            replace(
                item,
                label=full(item.label),
                writers=tuple(map(full, item.writers)),
                readers=tuple(map(full, item.readers)),
                scaled_by=tuple(map(full, item.scaled_by)),
            )
            for item in block.activations
        ),
        residual_writers=tuple(map(full, block.residual_writers)),
        returns=block.returns,
    )


def _keep_shared(model: PreTrainedModel, blocks: list[Block]) -> tuple[Block, ...]:
    """Keep linears that several blocks share as they are: each block would round them for its own input."""
    shared = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}

    def kept(linear: Linear) -> Linear:
        return replace(linear, keep="several blocks share it") if linear.weight_name in shared else linear

    return tuple(replace(block, linears=tuple(map(kept, block.linears))) for block in blocks)
