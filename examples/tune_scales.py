"""Trains the scales of a packed checkpoint, its codes fixed: `python examples/tune_scales.py PACKED TEXT OUT`.

This is PEQA (Kim et al. 2023, arXiv:2305.14152). The result is a checkpoint of the same size and format. There are few
scales, so the optimizer's states are small; and a weight is unpacked only while its layer is computed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

import quantc
from quantc.formats import format_of
from quantc.numerics.qtensor import QTensor
from quantc.runtime.layers import QuantLinear
from quantc.spec import Uniform


class TrainedScales(nn.Module):
    """A packed linear whose scales are multiplied by 1 + factors."""

    def __init__(self, packed: QuantLinear):
        super().__init__()
        self.packed = packed
        self.factors = nn.Parameter(torch.zeros_like(self.unpacked().scales, dtype=torch.float32))

    def unpacked(self) -> QTensor:
        packed = self.packed
        return format_of(packed.spec).unpack(packed.parts(), packed.spec, packed.matrix_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y (..., N); the backward pass unpacks the weight again."""
        return checkpoint(self.multiply, x, self.factors, use_reentrant=False)

    def multiply(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        tensor = self.unpacked()
        weight = replace(tensor, scales=tensor.scales * (1 + factors)).effective_weight()
        return F.linear(x, weight.to(x.dtype), self.packed.bias)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """Return the packed linear, with the scales it has now, rounded to float16."""
        tensor = self.unpacked()
        tensor.scales = (tensor.scales * (1 + self.factors)).half()
        for name, part in format_of(self.packed.spec).pack(tensor).items():
            setattr(self.packed, name, part)
        return self.packed


def put_in(model: nn.Module) -> dict[str, TrainedScales]:
    """Let the scales of every packed linear with a uniform grid be trained, and nothing else; return these by name."""
    model.requires_grad_(False)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    trained = {name: TrainedScales(linear) for name, linear in linears.items() if isinstance(linear.spec.grid, Uniform)}
    for name, module in trained.items():
        model.set_submodule(name, module)
    return trained


def train(model: nn.Module, windows: torch.Tensor, steps: int, rate: float) -> list[float]:
    """Take a step for a window (1, T) at a time; return the losses, in nats per token."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        window = windows[step % len(windows)][None]
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1} of {steps}: {losses[-1]:.4f} nats per token", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("packed", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=50, help="of the optimizer")
    parser.add_argument("--tokens", type=int, default=256, help="of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="what a step changes a scale by, of its size")
    settings = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(settings.packed)
    model = quantc.load(settings.packed, dtype=torch.float32)
    tokens = tokenizer(settings.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    windows = tokens[: len(tokens) // settings.tokens * settings.tokens].view(-1, settings.tokens)
    trained = put_in(model)
    train(model, windows, settings.steps, settings.rate)
    for name, module in trained.items():
        model.set_submodule(name, module.finished())
    model.save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)


if __name__ == "__main__":
    main()
