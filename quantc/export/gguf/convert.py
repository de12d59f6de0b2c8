"""From quantc's codes, scales and zeros to GGUF's blocks, where these hold them exactly, and why not where they do not.

Weights on the grids of spec/grids/ggml.py and in MXFP4 are blocks already. Of uniform ones, a group of any multiple of
32 becomes blocks of 32 that repeat its scale. Zero points become minima: w = (q - z) s is stored as q d + m, d = s and
m = -z s, which float16 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...checkpoint.config import PackedEntry
from ...numerics.grids import GgmlArithmetic
from ...numerics.qtensor import QTensor
from ...spec import Ggml, Uniform
from ..misfit import Misfit, misfit_of_structure
from .blocks import TYPES, Blocks, BlockType

BLOCK = 32
SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
ASYMMETRIC = {4: "Q4_1", 5: "Q5_1"}


def choose_type(entry: PackedEntry) -> BlockType | Misfit:
    """Return the block type that holds a packed weight, or why none does."""
    spec, k = entry.spec, entry.shape[1]
    if (misfit := misfit_of_structure(entry)) is not None:
        return misfit
    if spec.code.upper() in TYPES:
        return TYPES[spec.code.upper()]
    if not isinstance(spec.grid, Uniform):
        return Misfit(f"it has the code {spec.code}, which no block has", "with --target gguf")
    if k % BLOCK:
        return Misfit(f"blocks of {BLOCK} do not divide its rows of {k} weights", "with --pin '*{name}=16'")
    group = spec.group_length(entry.shape)
    if group % BLOCK and group < k:
        return Misfit(f"it has groups of {group}, and blocks have {BLOCK} weights", f"with --group-size {BLOCK}")
    name = (SYMMETRIC if spec.symmetric else ASYMMETRIC).get(spec.bits)
    if name is not None:
        return TYPES[name]
    kind = "symmetric" if spec.symmetric else "asymmetric"
    narrow = "with --bits 8 --symmetric" if spec.bits > 5 else "with --bits 4"
    remedy = "with --symmetric" if spec.bits in SYMMETRIC else narrow
    return Misfit(f"it has {kind} codes of {spec.bits} bits, for which no block is exact", remedy)


def to_blocks(tensor: QTensor) -> Blocks:
    """Return the blocks of a weight (..., N, K) that `choose_type` has found a type for."""
    grid = tensor.spec.grid
    if isinstance(grid, Ggml):
        return _of_grid(tensor, grid)
    if not isinstance(grid, Uniform):
        return Blocks(tensor.codes, tensor.scales)  # MXFP4: the same codes and bytes
    scales = _of_blocks(tensor.scales, tensor)
    if tensor.zeros is None:
        return Blocks(tensor.codes, scales)
    minima = -_of_blocks(tensor.zeros, tensor).float() * scales.float()
    return Blocks(tensor.codes, scales, minima.half())


def _of_grid(tensor: QTensor, grid: Ggml) -> Blocks:
    """Return the numbers of a weight on a block type of GGUF."""
    found = GgmlArithmetic(grid).block_scales(tensor.parameters)
    blocks = Blocks(tensor.codes, found.d)
    if found.dmin is not None:
        blocks.minima = found.dmin if grid.sub_bits else -found.dmin
    if found.subs is not None:
        blocks.sub_scales = found.subs.flatten(-2).to(torch.uint8 if grid.minima else torch.int8)
    if found.sub_minima is not None:
        blocks.sub_minima = found.sub_minima.flatten(-2).to(torch.uint8)
    return blocks


def _of_blocks(values: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """Return values of groups (..., N, G) repeated for the blocks of each: (..., N, K / 32)."""
    k = tensor.shape[1]
    group = tensor.spec.group_length(tensor.shape)
    first = torch.arange(0, k, BLOCK, device=values.device)
    return values[..., first // group]


@dataclass
class Rounding:
    """What storing minima in float16 has changed, over all weights of a file."""

    squared: float = 0.0
    largest: float = 0.0
    weights: int = 0

    def add(self, tensor: QTensor, blocks: Blocks) -> None:
        """Count a weight: its error in steps of its group's scale."""
        if tensor.zeros is None or blocks.minima is None:
            return
        exact = -_of_blocks(tensor.zeros, tensor).float() * blocks.scales.float()
        steps = ((blocks.minima.float() - exact) / blocks.scales.float()).abs()
        self.squared += float(steps.double().square().sum())
        self.largest = max(self.largest, float(steps.max()))
        self.weights += steps.numel()

    @property
    def rms(self) -> float:
        """The root of the mean square, in steps of the scale."""
        return (self.squared / self.weights) ** 0.5 if self.weights else 0.0
