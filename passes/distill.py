"""distill: trains the scales of the whole quantized model on the original's predictions, after all blocks are rounded.

`tune` trains every block to reproduce its float twin; here all blocks are trained at once for what counts in the end,
the divergence of the predicted distributions. Codes and zero points stay. What is kept is the best state on calibration
batches that were not trained on, which may be the one it started from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..calibration.hidden_states import HiddenStates
from ..calibration.stream import CalibrationRun
from ..errors import UsageError
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run
from ..pipeline.work import FinishWork
from ..training.distillation import Distillation

RATE = 0.002  # of Adam's first step, as a share of a scale, falling to 0


@dataclass(frozen=True)
class DistillConfig:
    """steps: of training, a batch of 2048 tokens each."""

    steps: int = 28

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}, but training takes 1 or more; raise it or drop the pass distill.")


@register
class Distill(Pass):
    """Trains scales against the original's own output."""

    name = "distill"
    Config = DistillConfig
    needs = frozenset({Fact.QUANTIZED})

    def __init__(self, config: DistillConfig):
        super().__init__(config)
        self._teacher = HiddenStates((0,))
        self._tokens = torch.empty(0)

    @property
    def calibrated(self) -> bool:
        return True

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Keep the outputs of the original's last block."""
        run.progress.stage("Original predictions", len(run.graph.blocks))
        for block in run.graph.blocks:
            with run.loaded(block):
                calibration.advance(block)
        self._tokens = tokens
        self._teacher = calibration.snapshot()
        run.progress.done()

    def finish(self, work: FinishWork) -> None:
        report = work.run.report
        if work.run.residual is not None:
            report.refused["distill"] = "the residual stream is rotated by the weights; rotate online instead"
            return
        with TemporaryDirectory(prefix="distill-", dir=work.writer.folder) as folder:
            found = Distillation(work, self._tokens, self._teacher, Path(folder), RATE).train(self.config.steps)
        self._teacher = HiddenStates((0,))  # memory of all hidden states is free again
        report.notes.append(f"distill: KL divergence on held-out text {found.after:.4f}, {found.before:.4f} before")
