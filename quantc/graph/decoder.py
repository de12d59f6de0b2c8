"""Finds the decoder blocks of a model, and what is outside them.

A model may have several lists of blocks: a tower for images beside its decoder, say. The decoder's is the one that a
run on tokens alone reaches; the tower may well be the larger part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .blocks import BlockCall, Returns, blocks_replaced, describe_return, running, state_place

Load = Callable[[str], None]
Free = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Decoder:
    """Names of the decoder blocks, in order, and of blocks elsewhere that a run on tokens alone does not reach."""

    blocks: list[str]
    idle: tuple[str, ...] = ()


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the decoder blocks where all weights are in memory; see `find_decoder`."""
    return find_decoder(model, lambda _: None, lambda _: None).blocks


def find_decoder(model: nn.Module, load: Load, free: Free) -> Decoder:
    """Return the decoder: of the nn.ModuleLists that a run on tokens reaches, the one with the most weights.

    load(prefix): gives the parameters under a name their weights; free(module): takes them away again. Where there is
    only one list nothing is run. Otherwise the tensors outside all lists are loaded and stay loaded, and so is the
    first block of every list while it runs. Raises ModelError when no list holds linear weights, or none is reached.
    """
    lists = _block_lists(model)
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks: an nn.ModuleList whose members hold linear weights was "
            "looked for and none was found; quantc quantizes decoder language models."
        )
    reached = set(lists) if len(lists) == 1 else _reached(model, lists, load, free)
    if not reached:
        raise ModelError(
            f"{type(model).__name__} ran none of its blocks ({', '.join(lists)}) on a probe of tokens; "
            "quantc needs a decoder that reads tokens."
        )
    best = max(reached, key=lists.__getitem__)
    idle = [name for other in lists if other not in reached for name in _members(model, other)]
    return Decoder(_members(model, best), tuple(idle))


def _block_lists(model: nn.Module) -> dict[str, int]:
    """Return name and weights of every module list that is in no other list; lists of bare layers only if alone."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not _inside_a_list(model, name):
            lists[name] = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim >= 2)
    lists = {name: size for name, size in lists.items() if size}
    composed = {name: size for name, size in lists.items() if _is_composed(model.get_submodule(name))}
    return composed or lists


def _inside_a_list(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _is_composed(modules: nn.Module) -> bool:
    return any(True for member in modules.children() for _ in member.children())


def _members(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{index}" for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def _reached(model: nn.Module, lists: dict[str, int], load: Load, free: Free) -> set[str]:
    """Return the lists whose blocks are called. The first block of each runs; the others hand the hidden state on."""
    names = [name for each in lists for name in _members(model, each)]
    load_outside(model, names, load)
    modules = [model.get_submodule(name) for name in names]
    returns: dict[str, Returns] = {}

    def handle(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner, place = names[index].rpartition(".")[0], state_place(args, kwargs)
        hidden = None if place is None else BlockCall(args, kwargs, place).hidden
        if owner in returns and hidden is not None:
            return returns[owner].wrap(hidden)
        load(names[index])
        output = modules[index](*args, **kwargs)
        free(modules[index])
        returns[owner] = Returns(None) if hidden is None else describe_return(output, hidden)
        return output

    with running(model), blocks_replaced(modules, handle):
        model(input_ids=probe_tokens(model, (2, 24)), use_cache=False)
    return set(returns)


def probe_tokens(model: Any, shape: tuple[int, int]) -> torch.Tensor:
    """Return a batch of random tokens, int64 of a shape (samples, T); the same for the same vocabulary."""
    vocabulary = embedding_of(model).get_parameter("weight").shape[0]
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def load_outside(model: Any, blocks: list[str], load: Load, idle: tuple[str, ...] = ()) -> None:
    """Load what a run on tokens needs besides the blocks: all but an untied head and idle blocks elsewhere.

    Parameters that are there already are not read again.
    """
    head = name_of(model, model.get_output_embeddings())
    there = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    for name in outside_names(model, [*blocks, *idle]):
        if name not in there and not (head and name.startswith(head + ".") and not is_tied(model)):
            load(name)


def outside_names(model: PreTrainedModel, blocks: list[str]) -> list[str]:
    """Return names of the tensors outside the blocks, each shared tensor by the name it is stored under."""
    inside = tuple(f"{block}." for block in blocks)
    return [
        name for name in model.state_dict() if not name.startswith(inside) and name not in model.all_tied_weights_keys
    ]


def embedding_of(model: Any) -> nn.Module:
    """Return the token embedding; raises ModelError when the model has none."""
    embedding: nn.Module | None = model.get_input_embeddings()
    if embedding is None:
        raise ModelError(f"{type(model).__name__} has no token embedding; quantc quantizes decoder language models.")
    return embedding


def name_of(model: nn.Module, module: nn.Module | None) -> str:
    """Return the name of a module inside the model, or "" when it is not there."""
    return next((name for name, candidate in model.named_modules() if candidate is module), "")


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head shares the weights of the token embedding."""
    return f"{name_of(model, model.get_output_embeddings())}.weight" in model.all_tied_weights_keys
