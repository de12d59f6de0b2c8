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
from .members import Loading, Slice, expect, forget, join, linear_of, never_came

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

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of the weight, which any of the model's may be loaded into."""
        return {"weight": torch.get_default_dtype()}

    def take(self, part: str, tensor: torch.Tensor) -> None:
        """Keep the weight."""
        self._weight = tensor.clone()

    def finish(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return the module that multiplies with it; raises CheckpointError where it never came."""
        if self._weight is None:
            raise never_came(f"{self.name}.weight")
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
        self._loading: list[Any] = [  # a Loading or a FloatMember for each member
            FloatMember(member.name, cuts) if member.entry is None else Loading(member.name, member.entry, cuts)
            for member, cuts in zip(self._members, slices, strict=True)
        ]
        self._parts = {name: dtype for each in self._loading for name, dtype in each.dtypes().items()}
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
        if inputs != all_inputs:
            start = layer.tp_rank * inputs
            cuts, totals = [Slice(1, start, start + inputs)], list(outputs)
        else:
            cuts, totals = _output_slices(layer, outputs)
        if len(self._members) < len(cuts):  # one holds all that the layer multiplies at once
            before = [sum(totals[:number]) for number in range(len(totals))]
            moved = (Slice(0, at + cut.start, at + cut.stop) for at, cut in zip(before, cuts, strict=True))
            found, totals = [tuple(moved) if layer.tp_size > 1 else ()], [sum(totals)]
        else:
            found = [(cut,) for cut in cuts]
        for member, total in zip(self._members, totals, strict=True):
            if member.entry is not None and member.entry.shape != (total, all_inputs):
                raise CheckpointError(
                    f"the checkpoint packs {member.name} as {member.entry.shape}, but vLLM's model has a weight of "
                    f"{(total, all_inputs)} there; config.json does not belong to these weights."
                )
        return found

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


def _output_slices(layer: Any, sizes: Sequence[int]) -> tuple[list[Slice], list[int]]:
    """Return what this process has of each part of a layer's outputs, and how many outputs the whole part has."""
    ranks, shares = [layer.tp_rank] * len(sizes), [layer.tp_size] * len(sizes)
    if isinstance(layer, QKVParallelLinear):  # several processes have the same head of keys and values
        replicas = layer.num_kv_head_replicas
        ranks[1:], shares[1:] = [layer.tp_rank // replicas] * 2, [layer.tp_size // replicas] * 2
    cuts = [Slice(0, rank * size, (rank + 1) * size) for rank, size in zip(ranks, sizes, strict=True)]
    return cuts, [size * count for size, count in zip(sizes, shares, strict=True)]
