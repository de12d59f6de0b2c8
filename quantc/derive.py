"""Derives a ModelGraph by running the model. No table of model names.

One small batch runs through each kind of block on real weights; `trace.py` watches which tensor every linear
receives and where that tensor came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .blocks import BlockCall, describe_return, run_around_blocks
from .decoder import embedding_of, find_decoder, is_tied, load_outside, name_of, probe_tokens
from .graph import Block, Linear, ModelGraph
from .trace import BlockTracer


def derive(model: PreTrainedModel, load: Callable[[str], None], free: Callable[[nn.Module], None]) -> ModelGraph:
    """The graph of a model whose weights are on the meta device.

    load(prefix): gives the parameters under a name their weights; free(module): takes them away again.
    One block of each kind (class and parameter shapes) is loaded at a time; the others pass the hidden state on.
    Raises ModelError when the model's blocks cannot be found or run one by one.
    """
    embedding = name_of(model, embedding_of(model))
    decoder = find_decoder(model, load, free)
    names = decoder.blocks
    blocks = [model.get_submodule(name) for name in names]
    load_outside(model, names, load, decoder.idle)
    traced: dict[Any, Block] = {}
    found: list[Block] = []

    def run_block(index: int, call: BlockCall) -> Any:
        kind = _kind_of(blocks[index])
        if kind not in traced:
            load(names[index])
            traced[kind], output = _trace(blocks[index], call)
            free(blocks[index])
        else:
            output = traced[kind].returns.wrap(call.hidden)
        found.append(_rebase(traced[kind], index, names[index]))
        return output

    run_around_blocks(model, blocks, probe_tokens(model), run_block)
    return ModelGraph(
        blocks=_keep_shared(model, found),
        embedding=embedding,
        head=name_of(model, model.get_output_embeddings()),
        tied=is_tied(model),
        idle=decoder.idle,
    )


def _kind_of(block: nn.Module) -> Any:
    return type(block), tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _trace(block: nn.Module, call: BlockCall) -> tuple[Block, Any]:
    tracer = BlockTracer(block)
    output = tracer.run(call)
    returns = describe_return(output, call.hidden)
    return tracer.block(returns), output


def _rebase(block: Block, index: int, name: str) -> Block:
    """The block traced for a kind, with the full names of another block of that kind."""

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
    """Linears that several blocks share stay as they are: each block would round them for its own input."""
    shared = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}

    def kept(linear: Linear) -> Linear:
        return replace(linear, keep="several blocks share it") if linear.weight_name in shared else linear

    return tuple(replace(block, linears=tuple(map(kept, block.linears))) for block in blocks)
