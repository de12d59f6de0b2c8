"""ModelGraph: the blocks, linears, norms and activations of a model. `derive.py` makes one by running the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .blocks import Returns

LinearKind = Literal["linear", "conv1d", "stack"]
ActivationKind = Literal["residual", "normed", "value", "gated", "activated", "rows", "other"]


@dataclass(frozen=True)
class Linear:
    """One weight W (N, K) that a plan may quantize, or a stack of E of them.

    name: module name, or the name of the 3-D parameter for a stack of experts.
    reads: label of the activation it multiplies.
    transposed: the model stores it as (K, N), as Conv1D and some expert stacks do.
    keep: why it stays as it is, or "" when it is quantized.
    """

    name: str
    kind: LinearKind
    shape: tuple[int, int]
    reads: str
    experts: int = 0
    transposed: bool = False
    keep: str = ""

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1] * max(1, self.experts)

    @property
    def rows(self) -> int:
        """The dimension of output channels in the model's own tensor."""
        return -1 if self.transposed else -2

    @property
    def columns(self) -> int:
        """The dimension of input channels in the model's own tensor."""
        return -2 if self.transposed else -1

    @property
    def weight_name(self) -> str:
        """Name of the tensor in the source model."""
        return self.name if self.kind == "stack" else f"{self.name}.weight"


@dataclass(frozen=True)
class Norm:
    """A module whose output does not depend on its input's scale.

    of_residual: its input is the hidden state itself.
    """

    name: str
    of_residual: bool = False


@dataclass(frozen=True)
class Activation:
    """A tensor that linears read.

    writers: what computed it: the norm of a "normed" one, the linears (and norms) that feed the others.
    readers: the linears that multiply it, all of width K.
    order: when in the block it is first read, counted from 0; -1 if the probe never reached a reader.
    scaled_by: those writers whose output it is proportional to, channel by channel: v of a "value" one, the side of a
        "gated" one that is not activated. head_dim: channels of a head of a "value" one, else 0.
    """

    label: str
    kind: ActivationKind
    width: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    order: int = -1
    scaled_by: tuple[str, ...] = ()
    head_dim: int = 0


@dataclass(frozen=True)
class Block:
    """One decoder block. `residual_writers` are what it adds to the residual stream."""

    index: int
    name: str
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    activations: tuple[Activation, ...]
    residual_writers: tuple[str, ...]
    returns: Returns

    @property
    def quantized(self) -> tuple[Linear, ...]:
        return tuple(linear for linear in self.linears if not linear.keep)

    def inside(self, name: str) -> str:
        """Return the name inside the block of something in the block."""
        return name.removeprefix(f"{self.name}.")

    def readers(self, activation: Activation) -> list[Linear]:
        """Return the linears that read an activation and are to be quantized."""
        return [linear for linear in self.quantized if linear.reads == activation.label]


@dataclass(frozen=True)
class ModelGraph:
    """Everything the passes know about a model's structure.

    idle: blocks of other parts, such as a tower for images, which a run on tokens alone does not reach.
    """

    blocks: tuple[Block, ...]
    embedding: str
    head: str
    tied: bool
    idle: tuple[str, ...] = ()

    @cached_property
    def outside_weights(self) -> tuple[str, ...]:
        """The embedding's and the head's weights, once where they are tied."""
        names = (self.embedding,) if self.tied or not self.head else (self.embedding, self.head)
        return tuple(f"{name}.weight" for name in names)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """Every linear that is to be quantized, by name, in block order."""
        return {linear.name: linear for block in self.blocks for linear in block.quantized}
