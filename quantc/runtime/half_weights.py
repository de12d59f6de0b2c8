"""Weights of a loaded model that stay in two bytes a value on a CPU without products of them.

What a checkpoint does not pack, mostly the embedding and the head, is half floats on disk. Multiplied in float32 it
takes twice the memory, and one row twice the time, which is that of reading it; multiplied as it is, torch takes four
times as long for many rows. So the table stays as it is, and a panel of it at a time becomes float32, exactly, in a
cache. For a head of 49152 x 576 on two threads at AVX2, in ms for 1, 4, 32 and 512 rows of float32 and of bfloat16: as
they were 12, 18, 55, 480 and 2.1, 12, 95, 1550; by panels 8.7, 13, 35, 401 and 2.1, 13, 33, 451.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..machine.compute_dtype import HALF, multiplies

LEAST_VALUES = 1 << 22  # of a weight: caches hold smaller ones, whose halves would save nothing
PANEL_VALUES = 3 << 17  # float32, 1.5 MB: half of it or twice as much takes longer from 1 to 512 rows
FEW_ROWS = 4  # of half floats: fewer are multiplied by torch at the speed of memory


def keep_half(model: nn.Module, stored: torch.dtype) -> list[str]:
    """Let large weights of a model on the CPU be half floats, whatever the model is computed in; return their names.

    stored: the dtype that the files have them in. Only weights of plain linears and embeddings, and those in float32
    only where `stored` holds every value; none where the processor multiplies half floats. The outputs are those of
    before, but for the order of sums.
    """
    kept = []
    for users in _owners(model).values():
        weight = users[0][1].weight
        dtype = weight.dtype if weight.dtype in HALF else stored
        if all(type(module) in _KINDS for _, module in users) and _is_slow(weight, dtype) and _fits(weight, dtype):
            half = weight.detach().to(dtype)
            for _, module in users:
                _replace(module, half)
            kept.append(f"{users[0][0]}.weight")
    return kept


def _owners(model: nn.Module) -> dict[int, list[tuple[str, Any]]]:
    """Return, by identity of each parameter called weight, the modules that share it, with their names."""
    found: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            found.setdefault(id(weight), []).append((name, module))
    return found


def _is_slow(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether a weight gains from panels of a dtype."""
    large = weight.device.type == "cpu" and weight.numel() >= LEAST_VALUES
    return large and dtype in HALF and not multiplies(dtype)


def _fits(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    if weight.dtype not in (torch.float32, dtype):
        return False
    return all(torch.equal(panel.to(dtype).to(panel.dtype), panel) for panel in weight.detach().split(_rows(weight)))


def _replace(module: Any, half: torch.Tensor) -> None:
    """Replace a module's weight in place, so that hooks stay, and whatever else holds the module sees it too.

    The table is a buffer: under the same name in the state dict, but not counted for the model's dtype.
    """
    dtype = module._parameters.pop("weight").dtype
    module.register_buffer("weight", half)
    module.__class__ = _KINDS[type(module)]
    module.dtype = dtype


def _rows(weight: torch.Tensor) -> int:
    return max(1, PANEL_VALUES // weight.shape[1])


class _Half(nn.Module):
    """weight: a buffer, of half floats until a cast changes it. dtype: what the model is computed in."""

    weight: torch.Tensor
    dtype: torch.dtype

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        """Apply a change of the model, and cast the dtype of the outputs along with it."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class HalfEmbedding(_Half, nn.Embedding):
    """An embedding whose table is half floats; its rows come out in the model's dtype."""

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return super().forward(indices).to(self.dtype)


class HalfLinear(_Half, nn.Linear):
    """A linear y = x W^T + b whose weight is half floats; x (..., K), y (..., N) in x's dtype, sums in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, half = x.numel() // self.in_features, self.weight.dtype
        plain = not x.is_cpu or half not in HALF or x.dtype not in (torch.float32, half)
        few = x.dtype == half and rows < FEW_ROWS
        if plain or few or not rows or (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        y = _through_panels(x.reshape(rows, -1).float(), self.weight)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


_KINDS: dict[type[nn.Module], type[_Half]] = {nn.Embedding: HalfEmbedding, nn.Linear: HalfLinear}


@torch.no_grad()
def _through_panels(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return float32 (M, N), the product of x (M, K) and half floats (N, K)."""
    y, step = x.new_empty(len(x), len(weight)), _rows(weight)
    room = x.new_empty(step, weight.shape[1])
    for start in range(0, len(weight), step):
        half = weight[start : start + step]
        panel = room[: len(half)].copy_(half)
        torch.mm(x, panel.T, out=y[:, start : start + step])
    return y
