"""Exact rewrites of a block: edits of its parameters that must not change what the block computes.

What structure suggests, numbers prove: every edit is tried in float64 on a probe batch before it is made, and one
that changes the output is refused and named in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..numerics.hadamard import rotate
from .blocks import BlockCall
from .model_graph import Activation, Block, Linear

# parameter, by its name inside the block -> its new value, float64
Edits = dict[str, torch.Tensor]
Turn = Callable[[torch.Tensor], torch.Tensor]

# Models cast to float32 inside norms and softmax, so that exact rewrites agree to about 1e-6 of what a block adds.
TOLERANCE = 1e-4
PROBE_ROWS = 8


class Refusal(Exception):
    """Why a rewrite cannot be made, as the end of a sentence."""


def fold_scales(
    block: Block, module: nn.Module, item: Activation, scales: torch.Tensor, stored: torch.dtype
) -> tuple[Edits, torch.Tensor]:
    """Return edits that divide an activation by scales (K,) where it is written and multiply its readers by them.

    They come with the scales that were used, float64: a norm's new gain must be a value of the dtype it is
    stored in, and the scales make up for that, so that storing loses nothing. Raises Refusal.
    """
    edits, scales = divide_writer(block, module, item, scales, stored)
    for linear in block.linears:
        if linear.reads == item.label:
            name = weight_name(block, linear)
            weight = module.get_parameter(name).detach().double()
            edits[name] = weight * (scales[:, None] if linear.transposed else scales)
    return edits, scales


def divide_writer(
    block: Block, module: nn.Module, item: Activation, scales: torch.Tensor, stored: torch.dtype
) -> tuple[Edits, torch.Tensor]:
    """Return the writer's half of `fold_scales`, and the scales that were used."""
    if item.kind == "normed":
        return _divide_norm(block, module, item, scales.double(), stored)
    if item.kind in ("gated", "value"):
        return _divide_linear(block, module, item, scales.double())
    raise Refusal("nothing that a diagonal folds into writes it")


def weight_name(block: Block, linear: Linear) -> str:
    """Return the name of a linear's weight inside the block."""
    return block.inside(linear.weight_name)


def bias_name(weight: str) -> str:
    """Return the name of the bias that belongs to a weight, where there is one."""
    return weight.removesuffix("weight") + "bias"


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    """Return the nearest powers of two: multiplying by them is exact in every float dtype."""
    return torch.exp2(torch.log2(scales).round())


def _divide_norm(
    block: Block, module: nn.Module, item: Activation, scales: torch.Tensor, stored: torch.dtype
) -> tuple[Edits, torch.Tensor]:
    name = block.inside(item.writers[0])
    parameters, gain, offset = _plain_norm(module.get_submodule(name), item.width)
    others = [key for key in parameters if key != gain]
    if others:  # a bias is stored in few bits too: then only powers of two divide it exactly
        scales = powers_of_two(scales)
    whole = offset + parameters[gain]
    new = (whole / scales - offset).to(stored).double()
    used = torch.where(offset + new == 0, 1.0, whole / (offset + new))
    new = torch.where(offset + new == 0, parameters[gain], new)
    used = torch.where(whole == 0, 1.0, used)
    shifts = {key: parameters[key] / used for key in others}
    if any(_is_rounded(value, stored) for value in shifts.values()):  # where the norm multiplies by one plus its gain
        raise Refusal("its norm's bias would be rounded")
    return {f"{name}.{gain}": new} | {f"{name}.{key}": value for key, value in shifts.items()}, used


def whole_gain(block: Block, module: nn.Module, item: Activation) -> torch.Tensor:
    """Return float64 (K,), what the norm that writes an activation multiplies its channels by. Raises Refusal."""
    norm = module.get_submodule(block.inside(item.writers[0]))
    parameters, gain, offset = _plain_norm(norm, item.width)
    return offset + parameters[gain]


def _plain_norm(norm: nn.Module, width: int) -> tuple[dict[str, torch.Tensor], str, float]:
    """Return the parameters of a norm in float64, the name of its gain, and what is added to it. Raises Refusal."""
    parameters = {key: value.detach().double() for key, value in norm.named_parameters()}
    gain = gain_of(norm, parameters, width)
    return parameters, gain, offset_of(norm, parameters, gain)


def _is_rounded(value: torch.Tensor, stored: torch.dtype) -> bool:
    """Return whether storing a tensor in a dtype changes it noticeably."""
    return bool((value.to(stored).double() - value).abs().max() > TOLERANCE * value.abs().max())


def gain_of(norm: nn.Module, parameters: dict[str, torch.Tensor], width: int) -> str:
    """Return the parameter that multiplies: changing it does more than shift the output's rows."""
    if any(value.shape != (width,) for value in parameters.values()) or not 1 <= len(parameters) <= 2:
        raise Refusal("its norm has no plain gain")
    for name in parameters:
        change = _output(norm, parameters, {name: parameters[name] + 1}) - _output(norm, parameters, {})
        if bool((change - change[:1]).abs().max() > 1e-6 * change.abs().max()):
            return name
    raise Refusal("its norm has no plain gain")


def offset_of(norm: nn.Module, parameters: dict[str, torch.Tensor], gain: str) -> float:
    """Return 0 where the norm multiplies by its gain, 1 where it multiplies by one plus its gain."""
    ones = torch.ones_like(parameters[gain])
    slope = _output(norm, parameters, {gain: ones}) - _output(norm, parameters, {gain: 0 * ones})
    found = _output(norm, parameters, {})
    for offset in (0.0, 1.0):
        rest = found - slope * (offset + parameters[gain])
        if bool((rest - rest[:1]).abs().max() <= 1e-5 * found.abs().max()):
            return offset
    raise Refusal("its norm has no plain gain")


def _output(norm: nn.Module, parameters: dict[str, torch.Tensor], changed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the norm's output for a few fixed rows, float64."""
    width = next(iter(parameters.values())).shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, PROBE_ROWS, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return functional_call(norm, parameters | changed, (rows.to(next(norm.parameters()).device),))[0].double()


def _only_writer(block: Block, item: Activation) -> Linear:
    """Return the one linear that an activation is proportional to; raises Refusal."""
    writers = [linear for linear in block.linears if linear.name in item.scaled_by and linear.kind != "stack"]
    if len(writers) != 1:
        raise Refusal("no single linear writes it")
    return writers[0]


def _divide_linear(
    block: Block, module: nn.Module, item: Activation, scales: torch.Tensor
) -> tuple[Edits, torch.Tensor]:
    """Divide rows of the one linear that writes the activation: v, or the side of a gate that is not activated."""
    linear = _only_writer(block, item)
    name, bias = weight_name(block, linear), bias_name(weight_name(block, linear))
    own = _scales_of_rows(scales, linear.shape[0], item)
    edits: Edits = {}
    if bias in dict(module.named_parameters()):
        own = powers_of_two(own)
        edits[bias] = module.get_parameter(bias).detach().double() / own
    weight = module.get_parameter(name).detach().double()
    edits[name] = weight / (own if linear.transposed else own[:, None])
    if linear.shape[0] == item.width:
        return edits, own
    repeats = item.width // linear.shape[0]
    return edits, own.reshape(-1, 1, item.head_dim).expand(-1, repeats, -1).reshape(-1)


def _scales_of_rows(scales: torch.Tensor, rows: int, item: Activation) -> torch.Tensor:
    """Return (rows,), scales of a writer's rows; query heads of one value channel share one, the geometric mean."""
    if rows == item.width:
        return scales
    if item.kind != "value" or not item.head_dim or item.width % rows or rows % item.head_dim:
        raise Refusal("the linear that writes it writes something else too")
    shared = torch.log2(scales).reshape(rows // item.head_dim, -1, item.head_dim).mean(1)
    return torch.exp2(shared).reshape(-1)  # of equal powers of two exactly that


def rotate_heads(block: Block, module: nn.Module, item: Activation, order: int) -> Edits:
    """Return edits that rotate every head of an attention's output where v writes it, and its readers with it.

    Attention mixes tokens, not channels: query heads that share a value head get its rotation. Raises Refusal.
    """
    writer = _only_writer(block, item)
    if not item.head_dim or item.width % writer.shape[0] or writer.shape[0] % item.head_dim:
        raise Refusal("the linear that writes it writes something else too")

    def turned(name: str, dim: int) -> torch.Tensor:
        value = module.get_parameter(name).detach().double().transpose(dim, -1)
        heads = value.reshape(*value.shape[:-1], -1, item.head_dim)
        return rotate(heads, order).reshape(value.shape).transpose(dim, -1)

    name, bias = weight_name(block, writer), bias_name(weight_name(block, writer))
    edits = {name: turned(name, writer.rows)}
    if bias in dict(module.named_parameters()):
        edits[bias] = turned(bias, -1)
    for linear in block.linears:
        if linear.reads == item.label:
            name = weight_name(block, linear)
            edits[name] = turned(name, linear.columns)
    return edits


class Proof:
    """What a block adds to the hidden states of a probe call, in float64, and whether it still does so after edits.

    Where the model's own code does not run in float64 (a mask whose least value overflows, say), float32 has to do.
    """

    def __init__(self, block: Block, module: nn.Module, call: BlockCall):
        self._block, self._module = block, module
        try:
            self._start(call, torch.float64)
        except RuntimeError:
            self._start(call, torch.float32)

    def _start(self, call: BlockCall, dtype: torch.dtype) -> None:
        self._dtype, self._call, self._hidden = dtype, _cast(call, dtype), call.hidden.to(dtype)
        self.expected = self.output({})
        self._added = (self.expected - self._hidden).abs().amax(-1)  # of each token

    def holds(self, edits: Edits, turn: Turn | None = None) -> bool:
        """Return whether the output is unchanged, to the precision that the model's own casts leave.

        turn: a rotation of hidden states; then the edited block must give the rotated output for the rotated input.
        Measured token by token against what the block adds: beside the few huge values that some models carry along
        in the residual stream, every change would look small.
        """
        expected, hidden, added = self.expected, None, self._added
        if turn is not None:
            expected, hidden = turn(expected), turn(self._hidden)
            added = (expected - hidden).abs().amax(-1)
        changed = (self.output(edits, hidden) - expected).abs().amax(-1)
        return bool((changed <= TOLERANCE * added).all())

    def output(self, edits: Edits, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Return the edited block's output for the probe's hidden states, or for others."""
        call = self._call.with_hidden(self._hidden if hidden is None else hidden)
        parameters = {name: value.detach() for name, value in self._module.named_parameters()} | edits
        parameters = {name: value.to(self._dtype) for name, value in parameters.items()}
        with torch.no_grad():
            output = functional_call(self._module, parameters, call.args, call.kwargs)
        return self._block.returns.unwrap(output, call)


def _cast(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if type(value) in (tuple, list):
            return type(value)(cast(item) for item in value)
        return {key: cast(item) for key, item in value.items()} if type(value) is dict else value

    return replace(call, args=cast(call.args), kwargs=cast(call.kwargs))
