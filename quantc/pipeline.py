"""Passes and the build sweep that runs them over the blocks.

A pass declares the facts it needs, gives and breaks. The runner never re-orders: it refuses an order whose needs
are not met before anything heavy happens. A sweep holds one block's weights, its statistics and the hidden
states of the calibration set, never the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from .calibration import CalibrationRun
from .checkpoint import ResidualRotation
from .checkpoint_writer import CheckpointWriter
from .derive import outside_names
from .errors import CalibrationError, PassError
from .formats import format_of
from .frontend import Source, to_meta
from .frontend.source import tensors_under
from .gather import gather, gather_drifting, rounds, stages
from .graph import Activation, Block, Linear, ModelGraph
from .memory import RELEASE_BYTES, FreeMemory
from .numerics.basis import Rounding
from .plan import Plan
from .progress import Progress
from .qtensor import QTensor
from .report import Report
from .rewrite import Edits, Proof, Refusal, divide_writer, fold_scales, weight_name
from .stats import BAD_ROWS_LIMIT, Drift, Gram


class Fact(StrEnum):
    """What is true of the model at a point in the recipe."""

    PLANNED = "every linear has a spec"
    QUANTIZED = "every linear is rounded"


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
    free_memory: FreeMemory = field(default_factory=FreeMemory)
    residual: ResidualRotation | None = None  # that a pass has proven and folds into the blocks
    edited: set[str] = field(default_factory=set)  # tensors that are no longer the source's

    def shared(self, block: Block, names: Iterable[str]) -> bool:
        """Whether another part of the model shares one of a block's parameters."""
        tied = {*self.source.tied, *self.source.tied.values()}
        return any(f"{block.name}.{name}" in tied for name in names)


class Pass:
    """A step of the recipe. Subclasses set the class attributes and override `plan` or `build`.

    name: the recipe's key. Config: a frozen dataclass whose fields are the recipe's keys.
    needs, gives, breaks: facts.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()

    def __init__(self, config: Any):
        self.config = config

    @property
    def calibrated(self) -> bool:
        """Whether `build` asks for statistics, so that the calibration set has to run through the model."""
        return False

    @property
    def analyses(self) -> bool:
        """Whether `analyse` has something to do."""
        return type(self).analyse is not Pass.analyse

    def uncalibrated(self) -> Pass | None:
        """This pass where there is no calibration text; None leaves it out."""
        return None if self.calibrated else self

    @property
    def rounding(self) -> Rounding | None:
        """How this pass rounds weights, for earlier ones that try it; None where it rounds nothing."""
        return None

    def plan(self, run: Run) -> None:
        """Decide; only numbers are looked at."""

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Look at the original model before the build, in sweeps of its own; `folder` holds temporary files."""

    def rewrite(self, work: BlockWork) -> None:
        """Edit one block, whose weights have just been loaded, before any pass builds on it."""

    def build(self, work: BlockWork) -> None:
        """Work on one block, whose weights are loaded."""

    def build_outside(self, work: OutsideWork) -> None:
        """Work on the tensors outside the blocks."""

    def finish(self, work: FinishWork) -> None:
        """Work on the model as it has been written, after all blocks."""


REGISTRY: dict[str, type[Pass]] = {}


def register(kind: type[Pass]) -> type[Pass]:
    """Class decorator: makes a pass known to recipes under its name."""
    REGISTRY[kind.name] = kind
    return kind


def check_order(passes: list[Pass], planned: bool = False) -> None:
    """Raise PassError when a pass needs a fact that no earlier pass gives, or that one has broken since."""
    facts: set[Fact] = {Fact.PLANNED} if planned else set()
    for item in passes:
        for fact in sorted(item.needs - facts):
            givers = [name for name, kind in REGISTRY.items() if fact in kind.gives]
            raise PassError(
                f"the pass {item.name} needs that {fact.value}, which no pass before it provides; "
                f"put {' or '.join(givers) or 'a pass that does'} before it."
            )
        facts = (facts - item.breaks) | item.gives
    if Fact.QUANTIZED not in facts:
        raise PassError("the recipe ends with float weights; a recipe needs the pass quantize.")


@dataclass
class BlockWork:
    """One block in the build sweep: its weights are loaded; what a pass rounds goes into `quantized`."""

    run: Run
    block: Block
    module: nn.Module
    calibration: CalibrationRun | None
    quantized: dict[str, QTensor] = field(default_factory=dict)
    keep_statistics: bool = False  # for a pass that comes later
    originals: dict[str, torch.Tensor] = field(default_factory=dict)  # what rounded weights in the module replace
    _kept: dict[str, list[Gram]] = field(default_factory=dict)
    _proof: Proof | None = None

    @property
    def rounding(self) -> Rounding:
        return self.run.rounding

    def weight(self, linear: Linear, expert: int = 0) -> torch.Tensor:
        """float32 (N, K), of one expert of a stack, whichever way round the model stores it."""
        stored = self._parameter(linear).detach()
        matrix = stored[expert] if linear.kind == "stack" else stored
        return matrix.T if linear.transposed else matrix

    def original(self, linear: Linear) -> torch.Tensor:
        """float32 (N, K), or (E, N, K) of a stack: the weight before it was rounded, where passes have rounded it."""
        stored = self.originals.get(weight_name(self.block, linear), self._parameter(linear).data)
        return stored.transpose(-1, -2) if linear.transposed else stored

    def _parameter(self, linear: Linear) -> nn.Parameter:
        return self.module.get_parameter(weight_name(self.block, linear))

    def readers(self, activation: Activation) -> list[Linear]:
        """The linears that read an activation and that the plan quantizes."""
        planned = self.run.plan.specs
        return [linear for linear in self.block.readers(activation) if planned[linear.name] is not None]

    def statistics(self) -> Iterator[tuple[Activation, list[Gram]]]:
        """Every activation that quantized linears read, with its Gram matrices (one per expert of a stack).

        Activations come in rounds that fit STATISTICS_BYTES; each round runs the block once on the whole set.
        Without calibration the lists are empty. The forward passes run on the block's
        weights before rounding. What an earlier pass asked for is kept for later ones where all of it fits.
        """
        wanted = [item for item in self.block.activations if self.readers(item)]
        if self._kept:
            yield from self._hand_out(wanted, self._kept)
            return
        if self.calibration is None:
            for item in wanted:
                yield item, []
                self._release(item)
            return
        for items in rounds(wanted, self.experts):
            grams = self._new_grams(items)
            gather(self.calibration, self.block, self.module, items, grams)
            self._check_rows(items, grams)
            self._kept = grams if len(items) == len(wanted) and self.keep_statistics else {}
            yield from self._hand_out(items, grams)

    def drifting_statistics(self) -> Iterator[tuple[Activation, list[Gram], Drift | None]]:
        """Like `statistics`, but the rows are those of the block as far as it is rounded, with their drift.

        The caller puts the rounded readers of what it got into `quantized` before it asks for more. There is no drift
        where rows are still the original ones, and none for experts, whose rows change with the routing.
        """
        assert self.calibration is not None
        wanted = [item for item in self.block.activations if self.readers(item)]
        self._kept = {}
        for items in [part for stage in stages(wanted) for part in rounds(stage, lambda item: 2 * self.experts(item))]:
            grams = self._new_grams(items)
            if self.originals:
                drifts = gather_drifting(self.calibration, self.block, self.module, items, grams, self.originals)
            else:
                drifts = {}
                gather(self.calibration, self.block, self.module, items, grams)
            self._check_rows(items, grams)
            for item in items:
                yield item, grams.pop(item.label), drifts.pop(item.label, None)
                self._release(item)
            rounded = [reader for item in items for reader in self.readers(item)]
            self.originals |= {weight_name(self.block, linear): self._parameter(linear).data for linear in rounded}
            self.replace_weights(rounded)

    def _hand_out(
        self, items: list[Activation], grams: dict[str, list[Gram]]
    ) -> Iterator[tuple[Activation, list[Gram]]]:
        for item in items:
            yield item, grams[item.label] if self.keep_statistics else grams.pop(item.label)
            self._release(item)

    def usable_scales(self, item: Activation, scales: torch.Tensor) -> torch.Tensor:
        """The scales near these (K,) by which `divide` would really divide, float64; raises Refusal."""
        return divide_writer(self.block, self.module, item, scales, self._writer_dtype(item))[1]

    def divide(self, item: Activation, scales: torch.Tensor) -> str:
        """Divide an activation by scales (K,) where it is written and multiply its readers by them.

        Proven on a probe first. Returns "" when it was done, else why not; then nothing has changed.
        """
        assert self.calibration is not None
        try:
            edits, used = fold_scales(self.block, self.module, item, scales, self._writer_dtype(item))
        except Refusal as refusal:
            return str(refusal)
        refused = self.edit_proven(edits)
        if refused:
            return refused
        for gram in self._kept.get(item.label, []):
            gram.divide_rows(used)
        return ""

    def edit_proven(self, edits: Edits) -> str:
        """Make edits that keep the block's output on the probe; "" when they were made, else why not."""
        assert self.calibration is not None
        if self.run.shared(self.block, edits):
            return "another block shares its weights"
        if self._proof is None:
            self._proof = Proof(self.block, self.module, self.calibration.probe(self.block))
        if not self._proof.holds(edits):
            return "the block's output changed on the probe"
        for name, value in edits.items():
            self.edit(name, value)
        return ""

    def edit(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter, by its name inside the block, a new value: rounded to its dtype here and only here."""
        parameter = self.module.get_parameter(name)
        parameter.data = value.to(parameter.dtype)
        self.run.edited.add(f"{self.block.name}.{name}")

    def _writer_dtype(self, item: Activation) -> torch.dtype:
        return self.run.source.stored_dtype(item.writers[0] + ".weight") if item.writers else torch.float32

    def _release(self, item: Activation) -> None:
        weights = sum(self._parameter(linear).nbytes for linear in self.readers(item))
        self.run.free_memory.release(weights + Gram.bytes_for(item.width))

    def _check_rows(self, items: list[Activation], grams: dict[str, list[Gram]]) -> None:
        for item in items:
            bad = sum(gram.bad_rows for gram in grams[item.label])
            share = bad / max(1, bad + sum(gram.rows for gram in grams[item.label]))
            if share > BAD_ROWS_LIMIT:
                raise CalibrationError(
                    f"{share:.0%} of the rows that {item.readers[0]} receives are NaN or infinite, and past "
                    f"{BAD_ROWS_LIMIT:.0%} statistics mean nothing; check that the model runs in float32 on this text."
                )
            if bad:
                self.run.report.notes.append(f"{item.readers[0]} received {bad} non-finite calibration rows; left out")

    def experts(self, item: Activation) -> int:
        """How many Gram matrices the activation has: one per expert of a stack, else one."""
        return max(1, self.block.readers(item)[0].experts)

    def _new_grams(self, items: list[Activation]) -> dict[str, list[Gram]]:
        device = self.run.device
        return {item.label: [Gram(item.width, device) for _ in range(self.experts(item))] for item in items}

    def replace_weights(self, linears: Iterable[Linear]) -> None:
        """Put the rounded weights of these into the module, so that the block runs as the checkpoint will."""
        for linear in linears:
            rounded = self.quantized[linear.name].effective_weight()
            self._parameter(linear).data = rounded.transpose(-1, -2) if linear.transposed else rounded


@dataclass
class OutsideWork:
    """One tensor outside the blocks, loaded; what a pass rounds goes into `quantized`."""

    run: Run
    name: str
    quantized: dict[str, QTensor] = field(default_factory=dict)

    def weight(self) -> torch.Tensor:
        """float32, as the model stores it."""
        return self.run.source.model.state_dict()[self.name]


@dataclass
class FinishWork:
    """The model as it has been written, and the calibration set at its first block."""

    run: Run
    calibration: CalibrationRun
    writer: CheckpointWriter

    def floats(self, block: Block) -> dict[str, torch.Tensor]:
        """float32, by their names inside the block: its tensors that are not rounded."""
        packed = {linear.weight_name for linear in self._rounded(block)}
        names = [name for name, _ in tensors_under(self.run.source.model, block.name) if name not in packed]
        return {name.removeprefix(block.name + "."): self.writer.read(name).float() for name in names}

    def qtensors(self, block: Block) -> dict[Linear, QTensor]:
        """The block's rounded weights."""
        return {linear: self._unpacked(linear) for linear in self._rounded(block)}

    def replace(self, linear: Linear, tensor: QTensor) -> None:
        """Write a rounded weight of the same spec instead."""
        for part, stored in format_of(tensor.spec).pack(tensor).items():
            self.writer.replace(f"{linear.name}.{part}", stored.cpu())

    def _rounded(self, block: Block) -> list[Linear]:
        return [linear for linear in block.quantized if self.run.plan.specs[linear.name] is not None]

    def _unpacked(self, linear: Linear) -> QTensor:
        spec = self.run.plan.specs[linear.name]
        assert spec is not None
        storage, leading = format_of(spec), (linear.experts,) if linear.kind == "stack" else ()
        parts = storage.layout(spec, linear.shape, leading)
        stored = {part: self.writer.read(f"{linear.name}.{part}").to(self.run.device) for part in parts}
        return storage.unpack(stored, spec, linear.shape)


def build(run: Run, passes: list[Pass], tokens: torch.Tensor | None, writer: CheckpointWriter) -> None:
    """The build sweep: every block is loaded, worked on by the passes in order, written and freed.

    tokens: calibration set (samples, T), or None when no pass asks for statistics. Later blocks are calibrated on
    the outputs of the earlier ones as they were rounded.
    """
    graph = run.graph
    names = [block.name for block in graph.blocks]
    calibration = None if tokens is None else analyse(run, passes, tokens, writer.folder)
    finishing = [item for item in passes if item.calibrated and type(item).finish is not Pass.finish]
    first = calibration.snapshot() if calibration is not None and finishing else None
    _build_outside(run, passes, names, writer)
    run.progress.stage("Quantizing", len(graph.blocks))
    for block in graph.blocks:
        _build_block(run, passes, block, calibration, writer)
        run.progress.step(block.name)
    run.progress.done()
    if calibration is not None and first is not None:
        for item in finishing:
            calibration.restart(first)
            item.finish(FinishWork(run, calibration, writer))
    if calibration is not None:
        for name, rows in calibration.bad_rows.items():
            run.report.notes.append(f"{name} put out {rows} non-finite calibration rows; they were left out")


def analyse(run: Run, passes: list[Pass], tokens: torch.Tensor, folder: Path) -> CalibrationRun:
    """What comes before the build: the calibration set (samples, T) at the first block, and what passes make of it.

    folder: for temporary files.
    """
    run.progress.stage("Calibration inputs", 1)
    calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder)
    run.progress.step(f"{tokens.shape[0]} x {tokens.shape[1]} tokens")
    run.progress.done()
    _analyse(run, passes, calibration, tokens, folder)
    return calibration


def _analyse(run: Run, passes: list[Pass], calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
    analysing = [item for item in passes if item.calibrated and item.analyses]
    if not analysing:
        return
    before = calibration.snapshot()
    for item in analysing:
        item.analyse(run, calibration, tokens, folder)
        calibration.restart(before)


def _build_block(
    run: Run, passes: list[Pass], block: Block, calibration: CalibrationRun | None, writer: CheckpointWriter
) -> None:
    run.source.load(block.name)
    module = run.source.model.get_submodule(block.name).to(run.device)
    work = BlockWork(run, block, module, calibration)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    for item in passes:
        item.rewrite(work)
    for number, item in enumerate(passes, start=1):
        work.keep_statistics = any(type(later).build is not Pass.build for later in passes[number:])
        item.build(work)
    _write(run, block.name, work.quantized, writer)
    if calibration is not None and block is not run.graph.blocks[-1]:
        work.replace_weights(run.graph.linears[name] for name in work.quantized)
        calibration.advance(block)
    to_meta(module)
    run.free_memory.release(weights)


def _build_outside(run: Run, passes: list[Pass], blocks: list[str], writer: CheckpointWriter) -> None:
    for name in outside_names(run.source.model, blocks):
        to_meta(run.source.model)  # one of them at a time: embedding and head may outweigh many blocks
        run.source.load(name)
        work = OutsideWork(run, name)
        for item in passes:
            item.build_outside(work)
        _write(run, name, work.quantized, writer)
    to_meta(run.source.model)
    run.free_memory.release(RELEASE_BYTES)


def _write(run: Run, prefix: str, quantized: dict[str, QTensor], writer: CheckpointWriter) -> None:
    """Write what lies under a name: rounded weights as their parts, everything else in the source's dtype.

    What was edited and does not fit that dtype exactly is written as float32.
    """
    packed = {run.graph.linears[name].weight_name for name in quantized if name in run.graph.linears} | set(quantized)
    for name, tensor in tensors_under(run.source.model, prefix):
        if name not in packed and name not in run.source.tied:
            stored = tensor.detach().cpu().to(run.source.stored_dtype(name))
            exact = name not in run.edited or torch.equal(stored.float(), tensor.detach().cpu())
            writer.add(name, stored if exact else tensor.detach().cpu())
    for name, qtensor in quantized.items():
        for part, tensor in format_of(qtensor.spec).pack(qtensor).items():
            writer.add(f"{name}.{part}", tensor.cpu())
