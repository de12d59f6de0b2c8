"""rotate: quantized linears read their inputs through a randomised Hadamard rotation, where that loses less.

A rotation spreads what a few input channels carry over all of them, so that no weight group has outliers and the
rounding error of a group does not fall on the channels that matter. It is exact: x W^T = (x R)(W R)^T.

An online rotation is made on the input of a linear at inference. A folded one is made where the input is written, by
the weights, and costs nothing at inference; the fold is proven on a probe, and where that fails the rotation stays
online. Two inputs have a fold: the residual stream (one rotation for the whole model, read through norms) and the
output of attention (one for each head). What feeds down projections has none.

Online is the better one, not only the simpler: the residual fold has to put the norms' gains into the weights first,
which undoes the scaling that the model has learned. On SmolLM2-135M at 3 bits the KL divergence is 0.414 without
rotation, 0.395 folded, 0.323 online, and 0.306 online where it pays (198 of 210 linears).

Whether an online rotation pays is measured for every activation: its readers are rounded with and without, as the
plan and the recipe say (refinement aside), on a sample of output channels; what leaves less output error stays. On the
outlier model of the tests that is all of them at 4 bits, 6 of 28 linears at 3 and none at 2: KL divergence without,
with every and with the measured rotations 0.035, 0.004, 0.004 at 4 bits, 0.170, 0.160, 0.090 at 3 and 1.8, 5.6, 1.8
at 2. Scaled inputs have fewer outliers, so `scale` belongs before this pass: 0.0033 at 3 bits, 0.0050 after it.

A runtime that multiplies by a stored matrix (planning/targets.py) gets smaller blocks, which share their signs and it:
vLLM's have up to 256 inputs.

Weights that are rounded to nearest are never rotated, folded or not. The errors of a rotated weight are independent
of the inputs' strong common directions (a few eigenvalues of the Gram matrix hold most of its trace), and only error
feedback steers around them; see benchmarks/notebook/rotations-and-scaling.md.

Sources: QuIP# (Tseng et al. 2024, arXiv:2402.04396), QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), SpinQuant (Liu
et al. 2024, arXiv:2405.16406) for rotations with the gains folded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..calibration.stream import CalibrationRun
from ..checkpoint.config import ResidualRotation
from ..errors import UsageError
from ..graph.model_graph import Activation, Block, Linear
from ..graph.residual_rewrite import BlockTurn, prove_turn
from ..graph.rewrite import Refusal, rotate_heads, weight_name
from ..numerics.hadamard import block_order
from ..numerics.sampled_error import guides, output_change
from ..numerics.statistics import Gram
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run
from ..pipeline.work import BlockWork
from ..planning.targets import RUNTIMES
from ..spec import Trellis
from ..units import plural

# Below this a block mixes too few channels to pay for its additions.
SMALLEST_BLOCK = 16
SAMPLED_ROWS = 128  # output channels of each reader, at least, that are rounded with and without a rotation
SAMPLED_TILE = 64  # the same of trellis codes, whose search would take a fifth of all seconds for SmolLM2-135M
TRIED_EXPERTS = 8  # of a stack, at most
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
    """Rotates the inputs of planned linears: folded where that is asked for and proven, else online where it pays."""

    name = "rotate"
    Config = RotateConfig
    needs = frozenset({Fact.PLANNED})

    def __init__(self, config: Any):
        super().__init__(config)
        self._turns: dict[str, BlockTurn] = {}
        self._folds = "folded" in (config.residual, config.value)
        self._measures = True
        self._tried = self._off = 0  # linears

    @property
    def calibrated(self) -> bool:
        """Folds are proven on the calibration set's first tokens, online rotations measured on its statistics."""
        return self._folds or self._measures

    @property
    def analyses(self) -> bool:
        return self._folds and self.config.residual == "folded"

    def plan(self, run: Run) -> None:
        if not run.rounding.feedback:
            self._folds = self._measures = False
            run.report.notes.append("rotate was left out: a rotated model loses by rounding to nearest")
        elif run.plan.given:
            self._measures = False
            run.report.notes.append("rotate put no online rotation into the given plan")
        else:
            runtime = RUNTIMES.get(run.target or "")
            most, barred = (None, set[str]()) if runtime is None else (runtime.rotations, _barred(run))
            for name, linear in run.graph.linears.items():
                spec, block = run.plan.specs[name], block_order(linear.shape[1], most)
                if spec is not None and block >= SMALLEST_BLOCK and name not in barred:
                    run.plan.specs[name] = replace(spec, hadamard=block)
            if barred:
                kept = plural(len(barred), "linear")
                run.report.notes.append(f"{kept} not rotated: {run.target} holds no rotated experts and biases")

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Prove the residual fold on every block, before any is changed: if one cannot be rotated, none is."""
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
        config = run.source.model.config
        if config.get_text_config() is not config:  # image features may be added after any block, unrotated
            raise Refusal("the model has other parts than text, which may add to the hidden states between blocks")
        if run.graph.blocks[0].returns.carry is not None:
            raise Refusal("blocks hand on more than one hidden state of plain rows")
        hidden = calibration.probe(run.graph.blocks[0]).hidden
        order = block_order(hidden.shape[-1])
        if order < SMALLEST_BLOCK:
            raise Refusal(f"no Hadamard matrix mixes {hidden.shape[-1]} channels")
        for block in run.graph.blocks:
            with run.loaded(block) as module:
                if run.shared(block, (name for name, _ in module.named_parameters())):
                    raise Refusal(f"another block shares weights of {block.name}")
                call = calibration.probe(block).with_hidden(hidden)
                turns[block.name], hidden = prove_turn(block, module, call, order, writers)
        return turns

    def state(self) -> Any:
        return [self._tried, self._off]

    def restore(self, state: Any) -> None:
        self._tried, self._off = state

    def rewrite(self, work: BlockWork) -> None:
        found = self._turns.get(work.block.name)
        if found is not None:
            for name, value in found.edits(work.module):
                work.edit(name, value)
        if self._folds and self.config.value == "folded":
            items = [item for item in work.block.activations if item.kind == "value"]
            for item in items:
                self._fold_value(work, item)
            if not items:
                reason = f"no output of attention was recognised in {work.block.name}; its rotations stay online"
                work.run.report.refused.setdefault("rotate value", reason)

    def build(self, work: BlockWork) -> None:
        for item, grams in work.statistics() if self._measures else ():
            readers = [linear for linear in work.readers(item) if _rotation(work, linear)]
            if readers:
                try:
                    ratio = error_ratio(work, item, readers, grams)
                except ArithmeticError:  # statistics that are not finite are for quantize to report
                    continue
                self._decide(work.run, readers, ratio)
        if self._off and work.block is work.run.graph.blocks[-1]:
            work.run.report.notes.append(
                f"rotate left out {self._off} of {self._tried} linears: rotated they lose more"
            )

    def _decide(self, run: Run, readers: list[Linear], ratio: float | None) -> None:
        measured = "no output error to compare" if ratio is None else f"output error {ratio:.3g} times that without"
        pays = ratio is not None and ratio < 1
        self._tried += len(readers)
        self._off += 0 if pays else len(readers)
        for linear in readers:
            run.plan.remark(linear.name, f"rotated: {measured}" if pays else f"not rotated: {measured}")
            if not pays:
                _drop(run, linear)

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


def error_ratio(work: BlockWork, item: Activation, readers: list[Linear], grams: list[Gram]) -> float | None:
    """Return the output error of an activation's readers with rotation over that without; None without enough rows.

    Raises ArithmeticError where the statistics are not finite.
    """
    seen = [expert for expert, gram in enumerate(grams) if guides(gram)]
    block = _rotation(work, readers[0])  # all have the same inputs
    lost = {block: 0.0, 0: 0.0}
    specs = {reader: spec for reader in readers if (spec := work.run.plan.specs[reader.name])}
    bits = min(spec.bits for spec in specs.values())
    for expert in seen[:: -(-len(seen) // TRIED_EXPERTS) or 1]:
        gram, seen_rows = grams[expert].matrix, grams[expert].rows
        # At 2 bits a basis without rotation is not shrunk, and by its own measure it would always win.
        measure = work.rounding.shrunk(gram)
        for order in lost:
            basis = work.rounding.basis(gram, seen_rows, order, bits)
            for linear, spec in specs.items():
                weight = work.weight(linear, expert)
                rows = SAMPLED_TILE if spec.code == Trellis.name else SAMPLED_ROWS
                lost[order] += output_change(weight, basis, spec, measure, rows)
    return lost[block] / lost[0] if lost[0] > 0 else None


def _barred(run: Run) -> set[str]:
    """Return linears whose inputs a runtime does not rotate: experts, and those beside one that has a bias."""
    modules = dict(run.source.model.named_modules())
    found: set[str] = set()
    for block in run.graph.blocks:
        for item in block.activations:
            readers = block.readers(item)
            biased = any(getattr(modules.get(linear.name), "bias", None) is not None for linear in readers)
            found |= {linear.name for linear in readers if biased or linear.kind == "stack"}
    return found


def _rotation(work: BlockWork, linear: Linear) -> int:
    spec = work.run.plan.specs[linear.name]
    return 0 if spec is None else spec.hadamard


def _order_of_head(item: Activation) -> int:
    order = block_order(item.head_dim) if item.head_dim else 0
    if order < SMALLEST_BLOCK:
        raise Refusal(f"no Hadamard matrix mixes the {item.head_dim} channels of a head")
    return order


def _drop_online(run: Run, block: Block, weights: set[str]) -> None:
    """Take the online rotation from linears whose inputs come rotated; weights: their names inside the block."""
    for linear in block.quantized:
        if weight_name(block, linear) in weights:
            _drop(run, linear)


def _drop(run: Run, linear: Linear) -> None:
    spec = run.plan.specs[linear.name]
    if spec is not None:
        run.plan.specs[linear.name] = replace(spec, hadamard=0)
