"""The tensors of a packed weight while vLLM loads them, one at a time, and the packed module they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ...checkpoint.config import PackedEntry
from ...errors import CheckpointError
from ...formats import Parts, format_of
from ...numerics.slices import obstacle, slice_inputs, slice_outputs
from ...spec import QuantSpec
from ..layers import PackedWeight, QuantLinear
from ..packed import Packed, dtype_name

Kind = TypeVar("Kind", bound=Packed)


@dataclass(frozen=True)
class Slice:
    """Which outputs (along 0) or inputs (along 1) of a weight a process has."""

    along: int
    start: int
    stop: int


def never_came(tensor: str) -> CheckpointError:
    """Return the error for a tensor that the model needs and vLLM has not loaded."""
    return CheckpointError(f"the files have no tensor {tensor}, which the model needs; copy the checkpoint again.")


@dataclass
class Loading:
    """A packed weight of which some tensors have come.

    name: in the checkpoint. slices: what of it this process has, one after the other; none for all of it. Raises
    CheckpointError for a slice that cannot be stored.
    """

    name: str
    entry: PackedEntry
    slices: tuple[Slice, ...] = ()
    came: Parts = field(default_factory=dict)

    def __post_init__(self) -> None:
        for cut in self.slices:
            if (reason := obstacle(self.entry.spec, self.entry.shape, cut.along, cut.start, cut.stop)) is not None:
                raise CheckpointError(f"tensor parallelism cannot slice {self.name}: it {reason}.")

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtypes of the tensors that are to come."""
        return {name: part.dtype for name, part in self.entry.layout().items()}

    def take(self, part: str, tensor: torch.Tensor) -> None:
        """Keep a tensor of the weight; raises CheckpointError for one that is not as the config says."""
        expected = self.entry.layout().get(part)
        if expected is None or (tensor.dtype, tuple(tensor.shape)) != (expected.dtype, expected.shape):
            wanted = "none" if expected is None else f"{dtype_name(expected.dtype)} {expected.shape}"
            raise CheckpointError(
                f"{self.name}.{part} is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}, but config.json describes "
                f"{wanted}; the two do not belong together, copy the checkpoint again."
            )
        self.came[part] = tensor.clone()  # loaders use their buffers again

    def finish(self) -> list[tuple[PackedEntry, Parts]]:
        """Return the slices, each a packed weight of its own; raises CheckpointError for a tensor that never came."""
        if missing := [part for part in self.entry.layout() if part not in self.came]:
            raise never_came(f"{self.name}.{missing[0]}")
        whole, parts = self.entry, self.came
        self.came = {}
        if all((cut.start, cut.stop) == (0, whole.shape[cut.along]) for cut in self.slices):
            return [(whole, parts)]
        tensor = format_of(whole.spec).unpack(parts, whole.spec, whole.shape)
        found = [(slice_outputs, slice_inputs)[cut.along](tensor, cut.start, cut.stop) for cut in self.slices]
        return [(replace(whole, spec=each.spec, shape=each.shape), format_of(each.spec).pack(each)) for each in found]


def linear_of(entry: PackedEntry, parts: Parts, dtype: torch.dtype, device: torch.device) -> QuantLinear:
    """Return the module that multiplies with a packed weight, for activations of a dtype."""
    return _filled(QuantLinear(entry.spec, entry.shape, None, dtype), parts, device)


def table_of(entry: PackedEntry, parts: Parts, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    """Return a packed table, to be read row by row and multiplied with."""
    return _filled(PackedWeight(torch.empty(0, dtype=dtype, device="meta"), entry), parts, device)


def _filled(module: Kind, parts: Parts, device: torch.device) -> Kind:
    for name, tensor in parts.items():
        setattr(module, name, tensor.contiguous().to(device))
    if not module.leading:  # experts are prepared one by one, when tokens come to them
        module.prepare()
    return module


def join(weights: Sequence[tuple[PackedEntry, Parts]]) -> list[tuple[PackedEntry, Parts]]:
    """Return the weights with neighbours that are stored alike made one of all their outputs: one product for each."""
    found: list[tuple[PackedEntry, Parts]] = []
    for entry, parts in weights:
        if found and found[-1][0].spec == entry.spec and _has_own_rows(entry.spec):
            before, known = found[-1]
            shape = (before.shape[0] + entry.shape[0], entry.shape[1])
            found[-1] = replace(entry, shape=shape), {name: torch.cat([known[name], parts[name]]) for name in parts}
        else:
            found.append((entry, parts))
    return found


def _has_own_rows(spec: QuantSpec) -> bool:
    """Return whether all parts of a weight have a row for each output."""
    in_rows = spec.pattern.name in ("dense", "two-of-four")
    return in_rows and spec.grouping == "per_oc" and not spec.rank and spec.grid.rowwise


def expect(module: nn.Module, parts: dict[str, torch.dtype], take: Callable[..., None]) -> None:
    """Give a module parameters without values, which pass on to `take(part, tensor, shard_id)` what is loaded."""
    for part, dtype in parts.items():
        parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = _passing_on(part, take)  # type: ignore[attr-defined]
        module.register_parameter(part, parameter)


def _passing_on(part: str, take: Callable[..., None]) -> Callable[..., None]:
    def load(_: Any, tensor: torch.Tensor, shard_id: Any = None) -> None:
        take(part, tensor, shard_id)

    return load


def forget(module: nn.Module, parts: dict[str, torch.dtype]) -> None:
    """Take the parameters away again that `expect` gave."""
    for part in parts:
        delattr(module, part)
