"""What a pass is, what the passes of a run share, and the order they may run in.

A pass declares the facts it needs, gives and breaks. The runner (sweep.py) never re-orders: an order whose needs are
not met is refused before anything heavy happens.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..calibration.stream import CalibrationRun
from ..errors import PassError
from ..numerics.basis import Rounding
from .run import Run

if TYPE_CHECKING:
    from .work import BlockWork, FinishWork, OutsideWork


class Fact(StrEnum):
    """What is true of the model at a point in the recipe."""

    PLANNED = "every linear has a spec"
    QUANTIZED = "every linear is rounded"


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

    @property
    def reads_statistics(self) -> bool:
        """Whether `build` asks for Gram matrices, so that those of passes before it are kept."""
        return type(self).build is not Pass.build

    def uncalibrated(self) -> Pass | None:
        """Return the pass to run where there is no calibration text; None leaves it out."""
        return None if self.calibrated else self

    @property
    def rounding(self) -> Rounding | None:
        """How this pass rounds weights, for earlier ones that try it; None where it rounds nothing."""
        return None

    def plan(self, run: Run) -> None:
        """Decide what to do, from numbers alone."""

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Look at the original model before the build, in sweeps of its own; `folder` holds temporary files."""

    def rewrite(self, work: BlockWork) -> None:
        """Edit one block, whose weights have just been loaded, before any pass builds on it."""

    def build(self, work: BlockWork) -> None:
        """Work on one block, whose weights are loaded."""

    def build_outside(self, work: OutsideWork) -> None:
        """Work on the tensors outside the blocks."""

    def state(self) -> Any:
        """Return what `rewrite` and `build` remember of the blocks seen, as a JSON value; None for nothing."""
        return None

    def restore(self, state: Any) -> None:
        """Take back what `state` returned in an interrupted run; `plan` and `analyse` have been called."""

    def finish(self, work: FinishWork) -> None:
        """Work on the model as it has been written, after all blocks."""


REGISTRY: dict[str, type[Pass]] = {}


def register(kind: type[Pass]) -> type[Pass]:
    """Make a pass known to recipes under its name; a class decorator."""
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
