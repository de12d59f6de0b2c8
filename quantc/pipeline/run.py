"""A run: the model, its graph, plan and report, and what the passes share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ..checkpoint.config import ResidualRotation
from ..frontend import Source, to_meta
from ..graph.blocks import blocks_replaced
from ..graph.decoder import outside_names
from ..graph.model_graph import Block, ModelGraph
from ..machine.memory import FreeMemory
from ..numerics.basis import Rounding
from ..numerics.statistics import AddProducts, Gram
from ..plan import Plan
from ..progress import Progress
from ..report import Report
from ..spec import QuantSpec

Specs = Mapping[str, QuantSpec | None]  # linear, or weight outside the blocks -> how it is stored


class Container(Protocol):
    """A file of another format, for which a run's checkpoint is made.

    input_blocks: sizes of the blocks in which its reader rounds the inputs of weights to 8 bits.
    """

    input_blocks: tuple[int, ...]

    def check(self, specs: Specs) -> None:
        """Raise UsageError that names a weight which the file cannot hold."""

    def tensor_bits(self, name: str, spec: QuantSpec | None) -> int:
        """Return the bits that a weight takes in the file."""

    def input_block(self, name: str, spec: QuantSpec | None) -> int:
        """Return the size of the blocks in which the inputs of a weight are rounded, 0 where they are not."""

    def file_bytes(self, specs: Specs, dtypes: Mapping[str, torch.dtype] | None = None) -> int:
        """Return the size of the file for a plan.

        dtypes: of the tensors in the finished checkpoint that are not packed; None before it is there.
        """


@dataclass
class Run:
    """What the passes of one run share."""

    source: Source
    graph: ModelGraph
    plan: Plan
    report: Report
    progress: Progress
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounding: Rounding = field(default_factory=Rounding)  # what will be done to the weights
    add_products: AddProducts | None = None  # made for the device, see Gram
    free_memory: FreeMemory = field(default_factory=FreeMemory)
    residual: ResidualRotation | None = None  # that a pass has proven and folds into the blocks
    edited: set[str] = field(default_factory=set)  # tensors that are no longer the source's
    target: str | None = None  # a runtime that has to load the result, so that passes keep to the plan's formats
    container: Container | None = None  # what sizes are those of; None where it is the checkpoint itself

    @property
    def input_blocks(self) -> tuple[int, ...]:
        """Sizes of the blocks in which inputs are rounded by what reads the result; none where nothing rounds them."""
        return () if self.container is None else self.container.input_blocks

    def gram(self, width: int) -> Gram:
        """Return an empty Gram matrix on the device."""
        return Gram(width, self.device, self.add_products)

    @contextmanager
    def loaded(self, block: Block, step: bool = True) -> Iterator[nn.Module]:
        """Yield a block's module with its weights loaded onto the device; they are freed after the context.

        step: whether that is a step of the progress.
        """
        self.source.load(block.name)
        module = self.source.model.get_submodule(block.name).to(self.device)
        weights = sum(parameter.nbytes for parameter in module.parameters())
        try:
            yield module
        finally:
            to_meta(module)
            self.free_memory.release(weights)
        if step:
            self.progress.step(block.name)

    @contextmanager
    def outside_loaded(self) -> Iterator[None]:
        """Load everything outside the blocks that tokens reach; the whole model is freed after the context."""
        load_outside(self)
        try:
            yield
        finally:
            to_meta(self.source.model)

    def shared(self, block: Block, names: Iterable[str]) -> bool:
        """Return whether another part of the model shares one of a block's parameters."""
        tied = {*self.source.tied, *self.source.tied.values()}
        return any(f"{block.name}.{name}" in tied for name in names)


def load_outside(run: Run) -> None:
    """Load everything outside the blocks that tokens reach."""
    for name in outside_names(run.source.model, [*(block.name for block in run.graph.blocks), *run.graph.idle]):
        run.source.load(name)


def output_logits(run: Run, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return logits (B, T, V) of tokens (B, T) from the last block's hidden (B, T, ...); see `load_outside`."""
    model, blocks = run.source.model, run.graph.blocks
    modules: list[nn.Module] = [model.get_submodule(block.name) for block in blocks]
    with blocks_replaced(modules, lambda i, *_: blocks[i].returns.wrap(hidden)):
        return model(input_ids=tokens.to(run.device), use_cache=False).logits
