"""rotate: every quantized linear reads its input through a randomised Hadamard rotation.

A rotation spreads what a few input channels carry over all of them, so that no weight group has outliers and the
rounding error of a group does not fall on the channels that matter. It is exact: x W^T = (x R)(W R)^T.

An online rotation is made on the input of a linear at inference. A folded one is made where the input is written, by
the weights, and costs nothing at inference; the fold is proven on a probe, and where that fails the rotation stays
online. Two inputs have a fold: the residual stream (one rotation for the whole model, read through norms) and the
output of attention (one for each head). What feeds down projections has none.

Online is the better one, not only the simpler: the residual fold has to put the norms' gains into the weights first,
which undoes the scaling that the model has learned. On SmolLM2-135M at 3 bits the KL divergence is 0.414 without
rotation, 0.395 folded and 0.323 online.

Needs error feedback. After plain rounding the errors of a rotated weight are independent of the inputs' strong
common directions (a few eigenvalues of the Gram matrix hold most of its trace), and rounding to nearest does not
steer around them; see docs/results.md.

Sources: QuIP# (Tseng et al. 2024, arXiv:2402.04396), QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), SpinQuant (Liu
et al. 2024, arXiv:2405.16406) for rotations with the gains folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..calibration import CalibrationRun
from ..checkpoint import ResidualRotation
from ..errors import UsageError
from ..frontend import to_meta
from ..graph import Activation, Block
from ..numerics.hadamard import block_order
from ..numerics.residual import turn
from ..pipeline import BlockWork, Fact, Pass, Run, register
from ..residual import BlockTurn, prove_turn
from ..rewrite import Refusal, rotate_heads, weight_name

# Below this a block mixes too few channels to pay for its additions.
SMALLEST_BLOCK = 16
Placement = Literal["online", "folded"]


@dataclass(frozen=True)
class RotateConfig:
    """residual, value: where the inputs that read the residual stream (through norms) and the outputs of attention are
    rotated: online, at a small cost for each linear at inference, or folded into the weights, at a cost in quality."""

    residual: Placement = "online"
    value: Placement = "online"

    def __post_init__(self) -> None:
        for name in ("residual", "value"):
            if getattr(self, name) not in ("online", "folded"):
                raise UsageError(f"{name} is {getattr(self, name)!r}, but only online and folded exist; choose one.")


@register
class Rotate(Pass):
    """Gives every planned linear a rotation of its input: folded where that is asked for and proven, else online."""

    name = "rotate"
    Config = RotateConfig
    needs = frozenset({Fact.PLANNED})

    def __init__(self, config: Any):
        super().__init__(config)
        self._turns: dict[str, BlockTurn] = {}

    @property
    def calibrated(self) -> bool:
        """Folds are proven on the calibration set's first tokens."""
        return "folded" in (self.config.residual, self.config.value)

    def plan(self, run: Run) -> None:
        for name, linear in run.graph.linears.items():
            spec, block = run.plan.specs[name], block_order(linear.shape[1])
            if spec is not None and block >= SMALLEST_BLOCK:
                run.plan.specs[name] = replace(spec, hadamard=block)

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Prove the residual fold on every block, before any is changed: one that cannot turn keeps all from it."""
        if self.config.residual != "folded":
            return
        run.progress.stage("Proving rotations", len(run.graph.blocks))
        try:
            turns = self._prove(run, calibration)
        except Refusal as refusal:
            run.report.refused["rotate residual"] = f"{refusal}; rotated online instead"
        else:
            self._turns = turns
            blocks = run.graph.blocks
            some = turns[blocks[0].name]
            run.residual = ResidualRotation(some.width, some.order, blocks[0].name, blocks[-1].name)
            for block in blocks:
                _drop_online(run, block, set(turns[block.name].reads))
            run.report.count_rewrite(self.name, "residual")
        run.progress.done()

    def _prove(self, run: Run, calibration: CalibrationRun) -> dict[str, BlockTurn]:
        turns: dict[str, BlockTurn] = {}
        writers: dict[Any, dict[str, int]] = {}
        hidden = calibration.probe(run.graph.blocks[0]).hidden
        order = block_order(hidden.shape[-1])
        if order < SMALLEST_BLOCK:
            raise Refusal(f"no Hadamard matrix mixes {hidden.shape[-1]} channels")
        for block in run.graph.blocks:
            run.source.load(block.name)
            module = run.source.model.get_submodule(block.name).to(run.device)
            try:
                if run.shared(block, (name for name, _ in module.named_parameters())):
                    raise Refusal(f"another block shares weights of {block.name}")
                call = calibration.probe(block).with_hidden(hidden)
                turns[block.name], hidden = prove_turn(block, module, call, order, writers)
            finally:
                to_meta(module)
            run.progress.step(block.name)
        return turns

    def rewrite(self, work: BlockWork) -> None:
        found = self._turns.get(work.block.name)
        if found is not None:
            assert work.calibration is not None
            if work.block.index == 0:
                work.calibration.map_states(partial(turn, block=found.order))
            for name, value in found.edits(work.module):
                work.edit(name, value)
        if self.config.value == "folded":
            items = [item for item in work.block.activations if item.kind == "value"]
            for item in items:
                self._fold_value(work, item)
            if not items:
                reason = f"no output of attention was recognised in {work.block.name}; its rotations stay online"
                work.run.report.refused.setdefault("rotate value", reason)

    def _fold_value(self, work: BlockWork, item: Activation) -> None:
        try:
            edits = rotate_heads(work.block, work.module, item, _order_of_head(item))
        except Refusal as refusal:
            refused = str(refusal)
        else:
            refused = work.edit_proven(edits)
        if refused:
            work.run.report.refused[f"rotate {item.label}"] = f"{refused}; rotated online instead"
        else:
            readers = {weight_name(work.block, linear) for linear in work.block.linears if linear.reads == item.label}
            _drop_online(work.run, work.block, readers)
            work.run.report.count_rewrite(self.name, item.kind)


def _order_of_head(item: Activation) -> int:
    order = block_order(item.head_dim) if item.head_dim else 0
    if order < SMALLEST_BLOCK:
        raise Refusal(f"no Hadamard matrix mixes the {item.head_dim} channels of a head")
    return order


def _drop_online(run: Run, block: Block, weights: set[str]) -> None:
    """Take the online rotation from linears whose inputs come rotated; weights: their names inside the block."""
    for linear in block.quantized:
        spec = run.plan.specs[linear.name]
        if spec is not None and weight_name(block, linear) in weights:
            run.plan.specs[linear.name] = replace(spec, hadamard=0)
