"""A block in a rotated residual stream: f'(h Q) = f(h) Q, by its parameters alone.

Norms of the stream hand their gain to the linears after them, which read the rotated rows: W <- W diag(gain) Q.
What is added to the stream is rotated where it is written: W <- Q^T W. Which parameters write to it is found by
numbers: their contribution to the block's output follows a permutation of their output channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..numerics.residual import turn
from .blocks import BlockCall
from .model_graph import Block
from .rewrite import TOLERANCE, Edits, Proof, Refusal, bias_name, gain_of, offset_of, weight_name


@dataclass(frozen=True)
class _NormValues:
    """What a norm multiplies by and adds, float64 (K,), and the names of those parameters inside it ("" for none)."""

    gain: torch.Tensor
    shift: torch.Tensor
    gain_name: str
    shift_name: str
    offset: float = 0.0


@dataclass(frozen=True)
class BlockTurn:
    """Parameters of a block that change with the basis of the residual stream; names are relative to the block.

    order: of the rotation's blocks. reads: weight -> (dimension of its inputs, the norm before it or ""). writes:
    parameter -> dimension along which it writes to the stream.
    """

    order: int
    width: int
    reads: dict[str, tuple[int, str]]
    writes: dict[str, int]
    norms: tuple[str, ...]

    def edits(self, module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (parameter, new value in float64), one at a time: in float64 a block is large. Raises Refusal."""
        parameters = dict(module.named_parameters())
        norms = {name: _values_of(module.get_submodule(name), self.width) for name in self.norms}
        shifts = dict(self._shifts(parameters, norms))  # before any weight is replaced
        for name, values in norms.items():
            yield from self._norm_edits(name, values, parameters)
        for name, parameter in parameters.items():
            if name not in self.reads and name not in self.writes and name not in shifts:
                continue
            value = parameter.detach().double()
            if name in shifts:
                value = value + shifts[name]
            if name in self.reads:
                dim, norm = self.reads[name]
                value = value.transpose(dim, -1)
                value = turn(value * norms[norm].gain if norm else value, self.order).transpose(dim, -1)
            if name in self.writes:
                dim = self.writes[name]
                value = turn(value.transpose(dim, -1), self.order).transpose(dim, -1)
            yield name, value

    def _norm_edits(
        self, name: str, values: _NormValues, parameters: dict[str, nn.Parameter]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if values.gain_name:
            yield f"{name}.{values.gain_name}", torch.full_like(values.gain, 1 - values.offset)
        if not values.shift_name:
            return
        shift = torch.zeros_like(values.shift)
        if not self._moves_shift(name, parameters):
            if bool(((values.gain == 0) & (values.shift != 0)).any()):
                raise Refusal(f"a gain of {name} is zero where its bias is not")
            shift = turn(torch.where(values.gain == 0, 0.0, values.shift / values.gain), self.order)
        yield f"{name}.{values.shift_name}", shift

    def _moves_shift(self, norm: str, parameters: dict[str, nn.Parameter]) -> bool:
        """Return whether every reader has a bias to take the norm's: divided by small gains it would be large."""
        behind = [name for name, (_, before) in self.reads.items() if before == norm]
        return all(name.endswith("weight") and bias_name(name) in parameters for name in behind)

    def _shifts(
        self, parameters: dict[str, nn.Parameter], norms: dict[str, _NormValues]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what the biases of linears take over from the norms before them."""
        for weight, (dim, norm) in self.reads.items():
            if norm and norms[norm].shift_name and self._moves_shift(norm, parameters):
                matrix = parameters[weight].detach().double().transpose(dim, -1)
                yield bias_name(weight), matrix @ norms[norm].shift


def prove_turn(
    block: Block, module: nn.Module, call: BlockCall, order: int, known: dict[Any, dict[str, int]]
) -> tuple[BlockTurn, torch.Tensor]:
    """Return how to rotate a block, proven on a probe call, and its output for that call. Raises Refusal.

    known: writers by kind of block, shared between calls, so that a kind is searched once, or again for a block whose
    predecessor had zeros for weights.
    """
    proof = Proof(block, module, call)
    _check_reached(block, proof, module)
    width = call.hidden.shape[-1]
    norms = tuple(block.inside(norm.name) for norm in block.norms if norm.of_residual)
    reads = _readers(block, norms)
    kind = type(module), tuple((name, parameter.shape) for name, parameter in module.named_parameters())
    for search in (False, True) if kind in known else (True,):
        if search:
            known[kind] = find_writers(block, module, proof, width)
        found = BlockTurn(order, width, reads, known[kind], norms)
        if proof.holds(dict(found.edits(module)), partial(turn, block=order)):
            return found, proof.expected.float()
    between = {norm.name for norm in block.norms} & set(block.residual_writers)
    if between:
        raise Refusal(f"{min(between)} is between a linear and the residual stream")
    raise Refusal(f"the output of {block.name} changed on the probe")


def find_writers(block: Block, module: nn.Module, proof: Proof, width: int) -> dict[str, int]:
    """Return parameter -> dimension for all that write to the residual stream.

    The last ones are found first: what is added earlier also reaches the output through later parts of the block,
    until those are silenced.
    """
    candidates = _candidates(block, module, width)
    found: dict[str, int] = {}
    while True:
        silent = {name: torch.zeros_like(module.get_parameter(name)) for name in found}
        rest = [name for name in reversed(candidates) if name not in found]
        fresh = next((name for name in rest if _writes(module, proof, name, candidates[name], silent)), None)
        if fresh is None:
            biases = [bias_name(name) for name in found]
            return found | {name: -1 for name in biases if name in candidates}  # a bias of zeros shows in no output
        found[fresh] = candidates[fresh]


def _candidates(block: Block, module: nn.Module, width: int) -> dict[str, int]:
    """Return the parameters that are as wide as the stream, and the dimension along which they are."""
    weights = {weight_name(block, linear): linear for linear in block.linears}
    norms = tuple(block.inside(norm.name) + "." for norm in block.norms)
    found: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        dim = weights[name].rows if name in weights else -1
        if parameter.shape[dim] == width and not name.startswith(norms):
            found[name] = dim
    return found


def _writes(module: nn.Module, proof: Proof, name: str, dim: int, silent: Edits) -> bool:
    """Return whether permuted output channels of a parameter permute its contribution to the block's output."""
    parameter = module.get_parameter(name).detach()
    order = torch.randperm(parameter.shape[dim], generator=torch.Generator().manual_seed(0)).to(parameter.device)
    without = proof.output(silent | {name: torch.zeros_like(parameter)})
    alone = proof.output(silent) - without
    if not bool(alone.any()):
        return False
    permuted = proof.output(silent | {name: parameter.index_select(dim, order)}) - without
    return bool((permuted - alone[..., order]).abs().max() <= TOLERANCE * alone.abs().max())


def _check_reached(block: Block, proof: Proof, module: nn.Module) -> None:
    """Raise Refusal for a linear the probe did not reach; one used outside its module's forward changes the output."""
    unseen = {item.label for item in block.activations if item.order < 0}
    for linear in block.linears:
        name = weight_name(block, linear)
        if linear.reads in unseen and bool(module.get_parameter(name).any()):
            if torch.equal(proof.output({name: torch.zeros_like(module.get_parameter(name))}), proof.expected):
                raise Refusal(f"the probe never reached {linear.name}")


def _readers(block: Block, norms: tuple[str, ...]) -> dict[str, tuple[int, str]]:
    """Return weight -> (dimension, norm) for all linears that read the residual stream, directly or through a norm."""
    found: dict[str, tuple[int, str]] = {}
    for item in block.activations:
        norm = block.inside(item.writers[0]) if item.kind in ("normed", "rows") and item.writers else ""
        if item.kind == "residual" or norm in norms:
            readers = [linear for linear in block.linears if linear.reads == item.label]
            found |= {weight_name(block, linear): (linear.columns, norm) for linear in readers}
    return found


def _values_of(norm: nn.Module, width: int) -> _NormValues:
    parameters = {name: value.detach().double() for name, value in norm.named_parameters()}
    if not parameters:
        one = torch.tensor(1.0, dtype=torch.float64)
        return _NormValues(one, 0 * one, "", "")
    gain = gain_of(norm, parameters, width)
    offset = offset_of(norm, parameters, gain)
    whole = offset + parameters[gain]
    shift = next((name for name in parameters if name != gain), "")
    return _NormValues(whole, parameters[shift] if shift else torch.zeros_like(whole), gain, shift, offset)
