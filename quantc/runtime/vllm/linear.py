"""Linears of vLLM on packed weights: those that it multiplies at once keep each their own spec, or stay floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear

from ...checkpoint.config import PackedEntry
from ...errors import CheckpointError
from .members import Loading, Slice, expect, forget, join, linear_of

SHARDS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the members of its QKVParallelLinear


@dataclass(frozen=True)
class Member:
    """A linear of the checkpoint inside one of vLLM's. entry: None where it is not packed."""

    name: str
    entry: PackedEntry | None


class FloatMember:
    """A member that is not packed: its weight, or this process's slices of it."""

    def __init__(self, name: str, slices: tuple[Slice, ...]):
        self.name, self._slices = name, slices
        self._weight: torch.Tensor | None = None

    def take(self, part: str, tensor: torch.Tensor) -> None:
        """Keep the weight."""
        self._weight = tensor.clone()

    def finish(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return the module that multiplies with it; raises CheckpointError where it never came."""
        if self._weight is None:
            raise CheckpointError(
                f"the files have no tensor {self.name}.weight, which the model needs; copy the checkpoint again."
            )
        cuts = [self._weight.narrow(cut.along, cut.start, cut.stop - cut.start) for cut in self._slices]
        weight = torch.cat(cuts) if cuts else self._weight
        self._weight = None
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(weight.to(device, dtype), requires_grad=False)
        return module


class PackedLinearMethod(LinearMethodBase):
    """members: in the order of the outputs. check: what is left to check once the whole model is built."""

    def __init__(self, members: Sequence[Member], check: Callable[[], None]):
        self._members, self._check = members, check

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Let a layer take the tensors of all members; raises CheckpointError for what it cannot run."""
        slices = self._slices(layer, input_size_per_partition, output_partition_sizes, input_size)
        self._loading: list[Any] = []  # a Loading or a FloatMember for each member
        for member, cuts in zip(self._members, slices, strict=True):
            if member.entry is None:
                self._loading.append(FloatMember(member.name, cuts))
            else:
                self._loading.append(Loading(member.name, member.entry, cuts))
        layouts = [{"weight": params_dtype} if m.entry is None else _dtypes(m.entry) for m in self._members]
        self._parts = {name: dtype for layout in layouts for name, dtype in layout.items()}
        self._dtype = params_dtype
        expect(layer, self._parts, self._take)

    def _take(self, part: str, tensor: torch.Tensor, shard_id: Any) -> None:
        number = 0 if shard_id is None and len(self._members) == 1 else SHARDS.get(shard_id, shard_id)
        if not isinstance(number, int) or not 0 <= number < len(self._members):
            raise CheckpointError(
                f"vLLM gives {part} of {self._members[0].name} as shard {shard_id!r}, which quantc does not know; "
                "use the vLLM that docs/run.md names."
            )
        self._loading[number].take(part, tensor)

    def _slices(self, layer: Any, inputs: int, outputs: Sequence[int], all_inputs: int) -> list[tuple[Slice, ...]]:
        """Return for each member what of it this process has; raises CheckpointError where shapes do not agree."""
        totals, starts = _totals(layer, outputs) if inputs == all_inputs else (list(outputs), [])
        if len(self._members) == 1:  # it may hold all that the layer multiplies at once
            totals = [sum(totals)]
        for member, total in zip(self._members, totals, strict=True):
            if member.entry is not None and member.entry.shape != (total, all_inputs):
                raise CheckpointError(
                    f"the checkpoint packs {member.name} as {member.entry.shape}, but vLLM's model has a weight of "
                    f"{(total, all_inputs)} there; config.json does not belong to these weights."
                )
        if inputs != all_inputs:
            start = layer.tp_rank * inputs
            return [(Slice(1, start, start + inputs),) for _ in self._members]
        cuts = [Slice(0, start, start + size) for start, size in zip(starts, outputs, strict=True)]
        if len(self._members) == len(cuts):
            return [(cut,) for cut in cuts]
        before = [sum(_totals(layer, outputs)[0][:number]) for number in range(len(cuts))]
        moved = (Slice(0, at + cut.start, at + cut.stop) for at, cut in zip(before, cuts, strict=True))
        return [tuple(moved) if layer.tp_size > 1 else ()]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put packed modules in place of the tensors that came."""
        device = layer.get_parameter(next(iter(self._parts))).device
        forget(layer, self._parts)
        layer.packed = nn.ModuleList()
        for kind, run in groupby(self._loading, type):
            if kind is FloatMember:
                layer.packed.extend(member.finish(self._dtype, device) for member in run)
            else:
                weights = join([weight for member in run for weight in member.finish()])
                layer.packed.extend(linear_of(*weight, self._dtype, device) for weight in weights)
        self._check()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return y (..., N) of x (..., K), all members side by side."""
        if len(layer.packed) == 1:
            module = layer.packed[0]
            if isinstance(module, nn.Linear):
                return F.linear(x, module.weight, bias)
            return module.multiply(x, None, bias)
        y = torch.cat([module(x) for module in layer.packed], -1)
        return y if bias is None else y + bias


def _dtypes(entry: PackedEntry) -> dict[str, torch.dtype]:
    return {name: part.dtype for name, part in entry.layout().items()}


def _totals(layer: Any, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return, for parts of a layer's outputs of which this process has some, all outputs and where its own start."""
    ranks, parts = [layer.tp_rank] * len(sizes), [layer.tp_size] * len(sizes)
    if isinstance(layer, QKVParallelLinear):  # several processes have the same head of keys and values
        replicas = layer.num_kv_head_replicas
        ranks[1:], parts[1:] = [layer.tp_rank // replicas] * 2, [layer.tp_size // replicas] * 2
    totals = [size * count for size, count in zip(sizes, parts, strict=True)]
    return totals, [rank * size for rank, size in zip(ranks, sizes, strict=True)]
