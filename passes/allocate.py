"""allocate: decides how every linear is stored; the result is the plan.

Uniform allocation looks at numbers only. For a budget (an average of bits, or a size) every linear is first tried in
every candidate format (see quantc/sensitivity), and the formats are those whose predicted losses are least within it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..calibration.stream import CalibrationRun
from ..errors import UsageError
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Container, Run
from ..planning.budget import Budget, Shared
from ..planning.formats import Formats
from ..planning.head import check_automatic, head_specs, keep_where_it_fits, table_shapes
from ..planning.limits import Limit, limit_of
from ..planning.search import refine
from ..planning.settings import AUTO, GRID, AllocateConfig
from ..sensitivity import Candidate, Losses, kept_losses, measure
from ..sensitivity.wide_rows import with_wide_rows
from ..spec import QuantSpec

NARROW = 3  # bits of a code on average: grids lose twice what a trellis loses there
TRELLIS_NOTE = "--code trellis loses about half as much at these widths, and takes longer to decode"

Specs = dict[str, list[QuantSpec]]  # linear or table -> its candidates


@register
class Allocate(Pass):
    """The same code width for every linear, or formats of their own within a budget."""

    name = "allocate"
    Config = AllocateConfig
    gives = frozenset({Fact.PLANNED})

    @property
    def calibrated(self) -> bool:
        return self.config.has_budget

    @property
    def analyses(self) -> bool:
        return self.config.has_budget

    def uncalibrated(self) -> Pass | None:
        if self.config.has_budget:
            raise UsageError(
                "a budget chooses bits by what calibration shows, and --calib is none; pass --bits, or another --calib."
            )
        return Allocate(replace(self.config, code=GRID)) if self.config.code == AUTO else self

    def plan(self, run: Run) -> None:
        if run.plan.specs:  # a given plan stays as it is
            return
        linears, specs, formats = run.graph.linears, run.plan.specs, Formats.of(self.config, run.source)
        specs.update(formats.specs(linears))
        check_automatic(self.config)
        specs.update(head_specs(run, self.config, formats))
        if self.config.has_budget:  # one that is too small is refused here
            limit_of(run, self._budget(run, _without_losses), self.config).plan()
        else:
            self._refuse_without_budget()
            specs.update(formats.pinned(linears, specs))
            run.plan.instead.update(formats.instead(linears, specs))
            run.report.notes += [*formats.notes(run), *self._on_trellis(run)]

    def _refuse_without_budget(self) -> None:
        if self.config.search:
            raise UsageError("--search refines the plan of a budget, and there is none; pass --avg-bits or --size.")
        if self.config.sparsity is not None:
            raise UsageError(
                "--sparsity auto chooses within a budget, and there is none; pass --avg-bits, or a share such as 0.2."
            )

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Choose the mixed precision of least predicted loss within the budget."""
        if run.plan.given:
            return
        budget = self.budget(run, tokens, folder, as_read=True)
        limit = limit_of(run, budget, self.config)
        plan = limit.plan()
        if self.config.search:
            plan = self._search(run, budget, plan, limit, tokens, folder)
        run.plan.shared_out = True
        if not any(plan.specs.values()):  # all fits as it is
            keep_where_it_fits(run, self.config, plan)
        for name, spec in plan.specs.items():
            run.plan.specs[name] = spec
            run.plan.remark(name, _remark(plan, name, of_all=run.container is not None))
        run.report.notes.append(
            f"{budget.average(plan):.3f} bits a weight in mixed precision; predicted KL divergence {plan.loss:.3g}"
            f"{_of_reader(budget.besides(plan))}"
        )
        run.report.notes += self._on_trellis(run)

    def _on_trellis(self, run: Run) -> list[str]:
        """Return a note on trellis codes where grids are narrow and nobody asked for them."""
        planned = [spec for name in run.graph.linears if (spec := run.plan.specs[name])]
        narrow = bool(planned) and sum(spec.bits for spec in planned) <= NARROW * len(planned)
        return [TRELLIS_NOTE] if narrow and self.config.only_by_default else []

    def budget(self, run: Run, tokens: torch.Tensor, folder: Path, as_read: bool = False) -> Budget:
        """Return what every linear could be stored as, with losses measured now or in an earlier run.

        as_read: what reads the file adds its own losses, which quantc does not have when it measures a build.
        """

        def losses(specs: Specs) -> Losses:
            estimator = self.config.estimator
            tables = {name: found for name, found in specs.items() if name not in run.graph.linears}
            return kept_losses(
                run, tokens, estimator, specs,
                lambda: measure(estimator, run, tokens, folder, lambda linear: specs[linear.name], tables),
            )  # fmt: skip

        return self._budget(run, losses, as_read)

    def _budget(self, run: Run, losses: Callable[[Specs], Losses], as_read: bool = False) -> Budget:
        linears, planned, formats = run.graph.linears, run.plan.specs, Formats.of(self.config, run.source)
        tables = table_shapes(run) if self.config.head_bits == "auto" else {}
        specs = formats.candidates(linears, tables, planned)
        kept = {name: _kept_bits(run, linear.weight_name, linear.weights) for name, linear in linears.items()}
        kept |= {name: _kept_bits(run, name, n * k) for name, (n, k) in tables.items()}
        rated = with_wide_rows(losses({name: found for name, found in specs.items() if found}))
        run.plan.salience = rated.salience
        uniform = formats.uniform(linears, tables, planned)
        stored = run.container.tensor_bits if run.container is not None and self.config.size is not None else None
        besides = partial(_lost_by_reader, run.container, rated.inputs) if as_read and run.container else None
        return Budget(run.graph, rated, kept, formats.rules(), tables, uniform, stored, besides)

    def _search(
        self, run: Run, budget: Budget, plan: Shared, limit: Limit, tokens: torch.Tensor, folder: Path
    ) -> Shared:
        config = self.config
        planned = {name: spec and spec.to_dict() for name, spec in run.plan.specs.items()}
        question = {"avg_bits": config.avg_bits, "size": config.size, "planned": planned}
        refined = refine(run, tokens, folder, budget, plan, limit.fits, config.search, **question)
        run.report.notes.append(refined.note)
        return refined.plan


def _lost_by_reader(
    container: Container, inputs: dict[str, dict[int, float]], name: str, spec: QuantSpec | None
) -> float:
    """Return what rounding the inputs of a weight costs where the file has it so, 0 where that is not known."""
    return inputs.get(name, {}).get(container.input_block(name, spec), 0.0)


def _of_reader(lost: float) -> str:
    return f", of which {lost:.3g} by rounding activations to 8 bits as llama.cpp does" if lost else ""


def _without_losses(specs: Specs) -> Losses:
    return Losses({name: [Candidate(spec, 0.0) for spec in found] for name, found in specs.items()})


def _remark(plan: Shared, name: str, of_all: bool) -> str:
    """Return what a plan predicts of a weight. of_all: with its share of the loss of all."""
    share = f", {plan.losses[name] / plan.loss:.2%} of the plan's" if of_all and plan.loss else ""
    return f"predicted to add {plan.losses[name]:.2g} to the KL divergence{share}"


def _kept_bits(run: Run, name: str, weights: int) -> int:
    """Return the stored bits of a tensor that stays as it is."""
    return 8 * run.source.stored_dtype(name).itemsize * weights
