"""Recognises linears, norms and stacks of experts by what they compute, not by what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .model_graph import LinearKind, Norm


@dataclass(frozen=True)
class StackUse:
    """A use of a stack of expert weights: `expert` is None when all are used at once (bmm)."""

    name: str
    expert: int | None


class StackTable:
    """The 3-D parameters of a block, recognised again in whatever slice of them a function receives."""

    def __init__(self, block: nn.Module):
        self.parameters = {name: p for name, p in block.named_parameters() if p.ndim == 3}
        self._by_storage = {p.untyped_storage().data_ptr(): name for name, p in self.parameters.items()}

    def find(self, weight: Any) -> StackUse | None:
        if not isinstance(weight, torch.Tensor) or not self._by_storage or weight.is_meta:
            return None
        name = self._by_storage.get(weight.untyped_storage().data_ptr())
        if name is None:
            return None
        whole = self.parameters[name]
        if weight.ndim == 3 and weight.shape == whole.shape:
            return StackUse(name, None)
        if weight.ndim == 2 and weight.shape == whole.shape[1:]:
            return StackUse(name, (weight.storage_offset() - whole.storage_offset()) // whole.stride(0))
        return None


def linear_modules(block: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, LinearKind]]]:
    """Yield (name, (module, kind)) of modules whose forward computes x W^T + b and nothing else."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and _is_plain(module):
            yield name, (module, "linear")
        elif isinstance(module, Conv1D):
            yield name, (module, "conv1d")


def loose_weights(
    block: nn.Module, modules: dict[str, tuple[nn.Module, LinearKind]]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name of its module, weight) of matrices called `weight` that are not those of linear modules."""
    for name, parameter in block.named_parameters():
        owner = name.removesuffix(".weight")
        if parameter.ndim == 2 and owner != name and owner not in modules and not parameter.is_meta:
            yield owner, parameter


def _is_plain(module: nn.Linear) -> bool:
    """Return whether a module is a plain linear; one with its own forward counts if numbers show it changes nothing."""
    if type(module).forward is nn.Linear.forward:
        return True
    probe = torch.linspace(-1, 1, 3 * module.in_features).reshape(1, 3, -1).to(module.weight)
    output = module.forward(probe)
    return isinstance(output, torch.Tensor) and torch.allclose(output, nn.Linear.forward(module, probe), rtol=1e-4)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (N, K) of a linear or Conv1D."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def as_norm(name: str, module: nn.Module, x: torch.Tensor) -> Norm | None:
    """Return a norm if its output stays when its input is scaled, else None."""
    if any(parameter.ndim != 1 for parameter in module.parameters()) or x.shape[-1] < 2:
        return None
    large = x * (64 / x.abs().mean().clamp(min=1e-12))  # makes eps negligible
    base = module.forward(large)
    if not bool(base.std() > 0) or not _close(module.forward(large * 4), base):
        return None
    return Norm(name)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())
