"""What a pass is handed to work on: a block, a tensor outside the blocks, the model as it has been written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ..calibration.stream import CalibrationRun
from ..checkpoint.writer import CheckpointWriter
from ..errors import PassError
from ..formats import format_of
from ..frontend.source import tensors_under, to_meta
from ..graph.blocks import BlockCall
from ..graph.decoder import load_outside, outside_names, probe_tokens
from ..graph.model_graph import Activation, Block, Linear
from ..graph.rewrite import Edits, Proof, Refusal, divide_writer, fold_scales, weight_name
from ..numerics.basis import Rounding
from ..numerics.qtensor import QTensor
from ..numerics.statistics import Drift, Gram
from ..numerics.strips import strips_of
from ..spec import QuantSpec
from .run import Run

NO_SET = (
    "a pass asked for calibration, and this run has no calibration text; pass a text, or let the pass say that it is "
    "calibrated."
)


@dataclass
class BlockWork:
    """One block in the build sweep: its weights are loaded; what a pass rounds goes into `quantized`.

    This is the block of a run without calibration text; see `CalibratedWork`.
    """

    run: Run
    block: Block
    module: nn.Module
    quantized: dict[str, QTensor] = field(default_factory=dict, kw_only=True)
    keep_statistics: bool = field(default=False, kw_only=True)  # for a pass that comes later
    # The float weights that rounded ones have replaced in the module.
    originals: dict[str, torch.Tensor] = field(default_factory=dict, kw_only=True)
    _kept: dict[str, list[Gram]] = field(default_factory=dict, kw_only=True)
    _proof: Proof | None = field(default=None, kw_only=True)

    @property
    def calibration(self) -> CalibrationRun:
        """Return the calibration set, before this block; raises PassError in a run without one."""
        raise PassError(NO_SET)

    @property
    def rounding(self) -> Rounding:
        return self.run.rounding

    def weight(self, linear: Linear, expert: int = 0) -> torch.Tensor:
        """Return float32 (N, K), or one expert's of a stack, whichever way round the model stores it."""
        stored = self._parameter(linear).detach()
        matrix = stored[expert] if linear.kind == "stack" else stored
        return matrix.T if linear.transposed else matrix

    def original(self, linear: Linear) -> torch.Tensor:
        """Return float32 (N, K), or (E, N, K) of a stack: the weight as it was before passes rounded it."""
        stored = self.originals.get(weight_name(self.block, linear), self._parameter(linear).data)
        return stored.transpose(-1, -2) if linear.transposed else stored

    def _parameter(self, linear: Linear) -> nn.Parameter:
        return self.module.get_parameter(weight_name(self.block, linear))

    def readers(self, activation: Activation) -> list[Linear]:
        """Return the linears that read an activation and that the plan quantizes."""
        planned = self.run.plan.specs
        return [linear for linear in self.block.readers(activation) if planned[linear.name] is not None]

    def statistics(self) -> Iterator[tuple[Activation, list[Gram]]]:
        """Yield every activation that quantized linears read, with its Gram matrices (one per expert of a stack).

        Without calibration the lists are empty.
        """
        for item in self.block.activations:
            if self.readers(item):
                yield item, []
                self._release(item)

    def drifting_statistics(self) -> Iterator[tuple[Activation, list[Gram], Drift | None]]:
        """Yield as `CalibratedWork` does; raises PassError without calibration."""
        raise PassError(NO_SET)

    def usable_scales(self, item: Activation, scales: torch.Tensor) -> torch.Tensor:
        """Return the scales near these (K,) by which `divide` would really divide, float64; raises Refusal."""
        return divide_writer(self.block, self.module, item, scales, self._writer_dtype(item))[1]

    def divide(self, item: Activation, scales: torch.Tensor) -> str:
        """Divide an activation by scales (K,) where it is written and multiply its readers by them.

        The edit is proven on a probe first. Returns "" when it was made, else why not; then nothing has changed.
        """
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
        """Make edits that keep the block's output on the probe; return "" when they were made, else why not."""
        if self.run.shared(self.block, edits):
            return "another block shares its weights"
        if self._proof is None:
            self._proof = Proof(self.block, self.module, self._probe())
        if not self._proof.holds(edits):
            return "the block's output changed on the probe"
        for name, value in edits.items():
            self.edit(name, value)
        return ""

    def _probe(self) -> BlockCall:
        """Return a call of the block on random tokens, at the first block."""
        model, blocks = self.run.source.model, [block.name for block in self.run.graph.blocks]
        load_outside(model, blocks, self.run.source.load_for_tokens, self.run.graph.idle)
        tokens = probe_tokens(model, (1, 24))
        call = CalibrationRun(model, self.run.graph, tokens, self.run.device).probe(self.block)
        for owner in {name.rpartition(".")[0] for name in outside_names(model, blocks)}:
            if not any(block.startswith(f"{owner}.") for block in blocks):
                to_meta(model.get_submodule(owner))
        return call

    def edit(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter, by its name inside the block, a new value: rounded to its dtype here and only here."""
        parameter = self.module.get_parameter(name)
        parameter.data = value.to(parameter.dtype).contiguous()  # as it is read back when a run is resumed
        self.run.edited.add(f"{self.block.name}.{name}")

    def _writer_dtype(self, item: Activation) -> torch.dtype:
        return self.run.source.stored_dtype(item.writers[0] + ".weight") if item.writers else torch.float32

    def _release(self, item: Activation) -> None:
        weights = sum(self._parameter(linear).nbytes for linear in self.readers(item))
        self.run.free_memory.release(weights + Gram.bytes_for(item.width))

    def experts(self, item: Activation) -> int:
        """Return how many Gram matrices the activation has: one per expert of a stack, else one."""
        return max(1, self.block.readers(item)[0].experts)

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Put the weights from before rounding into the module for the context; rounded ones take no memory there."""
        for name, value in self.originals.items():
            self.module.get_parameter(name).data = value
        yield
        replaced = [linear for linear in self.block.quantized if weight_name(self.block, linear) in self.originals]
        self.replace_weights(replaced)

    def replace_weights(self, linears: Iterable[Linear]) -> None:
        """Put the rounded weights of these into the module, so that the block runs as the checkpoint will."""
        for linear in linears:
            rounded = self.quantized[linear.name].effective_weight()
            self._parameter(linear).data = rounded.transpose(-1, -2) if linear.transposed else rounded


@dataclass
class OutsideWork:
    """One tensor outside the blocks, read when it is asked for; what a pass rounds goes into `quantized`."""

    run: Run
    name: str
    quantized: dict[str, QTensor] = field(default_factory=dict)
    loaded: bool = False

    @property
    def by_strips(self) -> bool:
        """Whether it is a matrix that is not in memory, so that its rows are best read in strips."""
        tensor = self.run.source.model.state_dict(keep_vars=True)[self.name]
        return isinstance(tensor, nn.Parameter) and tensor.ndim == 2 and not self.loaded

    def weight(self) -> torch.Tensor:
        """Return the tensor in float32, as the model stores it."""
        if not self.loaded:
            self.run.source.load(self.name)
            self.loaded = True
        return self.run.source.model.state_dict()[self.name]

    def strips(self) -> Iterator[torch.Tensor]:
        """Yield the rows of a matrix in strips, float32 (N, K)."""
        return self.run.source.strips(self.name) if self.by_strips else strips_of(self.weight())


@dataclass
class FinishWork:
    """The model as it has been written, and the calibration set at its first block."""

    run: Run
    calibration: CalibrationRun
    writer: CheckpointWriter

    def floats(self, block: Block) -> dict[str, torch.Tensor]:
        """Return the block's tensors that are not rounded, float32, by their names inside the block."""
        packed = {linear.weight_name for linear in self._rounded(block)}
        names = [name for name, _ in tensors_under(self.run.source.model, block.name) if name not in packed]
        tied = self.run.source.tied  # written once, under the name that they are tied to
        return {block.inside(name): self.writer.read(tied.get(name, name)).float() for name in names}

    def qtensors(self, block: Block) -> dict[Linear, QTensor]:
        """Return the block's rounded weights."""
        return {linear: self._unpacked(linear, spec) for linear, spec in self._rounded(block).items()}

    def replace(self, linear: Linear, tensor: QTensor) -> None:
        """Write a rounded weight of the same spec instead."""
        for part, stored in format_of(tensor.spec).pack(tensor).items():
            self.writer.replace(f"{linear.name}.{part}", stored.cpu())

    def _rounded(self, block: Block) -> dict[Linear, QuantSpec]:
        specs = self.run.plan.specs
        return {linear: spec for linear in block.quantized if (spec := specs[linear.name]) is not None}

    def _unpacked(self, linear: Linear, spec: QuantSpec) -> QTensor:
        storage, leading = format_of(spec), (linear.experts,) if linear.kind == "stack" else ()
        parts = storage.layout(spec, linear.shape, leading)
        stored = {part: self.writer.read(f"{linear.name}.{part}").to(self.run.device) for part in parts}
        return storage.unpack(stored, spec, linear.shape)
