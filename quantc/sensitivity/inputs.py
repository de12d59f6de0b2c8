"""What a reader of a file loses by rounding the inputs of a linear: llama.cpp multiplies quantized weights with 8 bits.

It rounds the inputs of as many weights together as a block of the weight's type has, 32 or 256, to 127 steps of the
largest among them. Where few inputs are large, the larger blocks lose most of the others. An error e of the inputs x of
a token (K,) costs, to second order and with tokens as independent,

    1/2 E (h . e)^2,    h = W^T g

with g the gradient of fisher.py at the output. In llama.cpp a Q4_K_M file of Gemma 3 270M diverges by 0.0050 nats from
its own weights, and by less than 0.00001 where they are stored in float16 (benchmarks/notebook/gguf.md).
"""

from __future__ import annotations

from collections import defaultdict

import torch

from ..graph.model_graph import Linear
from ..pipeline.run import Run

STEPS = 127  # from 0 to the largest of a block


def inputs_error(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Return what rounding inputs (..., K) in blocks changes, float32; K is a multiple of the block."""
    blocks = rows.float().unflatten(-1, (-1, block))
    step = (blocks.abs().amax(-1, keepdim=True) / STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / step).round() * step - blocks).flatten(-2)


class InputLosses:
    """Sums up what rounding the inputs of linears costs, in blocks of several sizes."""

    def __init__(self, run: Run, blocks: tuple[int, ...]):
        self._run, self._blocks = run, blocks
        self._squares: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, linear: Linear, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Count inputs (..., K) of a linear of an own module, and the gradient (..., N) at its output."""
        blocks = [block for block in self._blocks if rows.shape[-1] % block == 0]
        if not blocks:
            return
        weight = self._run.source.model.get_parameter(linear.weight_name).detach().float()
        slopes = gradient.float() @ (weight.mT if linear.transposed else weight)
        for block in blocks:
            costs = (slopes * inputs_error(rows, block)).sum(-1, dtype=torch.float64)
            self._squares[linear.name][block] += float(costs.square().sum())

    def found(self, tokens: int) -> dict[str, dict[int, float]]:
        """Return, by linear and size of the blocks, the nats lost for each of the tokens added."""
        return {name: {block: total / 2 / tokens for block, total in of.items()} for name, of in self._squares.items()}
