"""allocate: decides how every linear is stored; the result is the plan.

Uniform allocation looks at numbers only. For a budget (an average of bits, or a size) every linear is first tried in
every candidate format (see quantc/sensitivity), and the formats are those whose predicted losses are least within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch

from ..calibration.stream import CalibrationRun
from ..errors import UsageError
from ..graph.model_graph import Linear
from ..pipeline.base import Fact, Pass, register
from ..pipeline.run import Run
from ..planning import candidates
from ..planning.budget import KEPT_BITS, Budget, Rules, Shared, format_label
from ..planning.candidates import DEFAULT_GROUP, best_group_size
from ..planning.head import DEFAULT_BITS, MOST_BLOCK_BITS, default_specs, table_shapes
from ..planning.limits import Limit, limit_of
from ..planning.search import refine
from ..planning.settings import AllocateConfig
from ..planning.sizes import output_bytes
from ..planning.targets import Runtime
from ..sensitivity import Candidate, Estimator, Losses, kept_losses, measure
from ..sensitivity.wide_rows import with_wide_rows
from ..spec import QuantSpec, spec_of_label
from ..units import plural

NEAREST = 4  # formats named in place of one that there is not
LARGE_BLOCK = 256  # weights of the block types with sub-scales


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
        return self

    def plan(self, run: Run) -> None:
        if run.plan.specs:  # a given plan stays as it is
            return
        everywhere = self._everywhere()
        for name, linear in run.graph.linears.items():
            if everywhere is None:
                run.plan.specs[name] = self._spec(self.config.bits, linear.shape)
            else:
                run.plan.specs[name] = everywhere if everywhere.grid.divides(linear.shape[1]) else None
        if everywhere is not None and not any(run.plan.specs.values()):
            raise UsageError(
                f"no layer can be stored as {everywhere.label()}, whose blocks of {everywhere.group_size} divide no "
                "row of this model; pass other --formats."
            )
        self._check_head()
        self._plan_head(run)
        if self.config.has_budget:
            limit_of(run, self._budget(run, self._without_losses), self.config).plan()  # one too small is refused here
        else:
            self._refuse_without_budget()
            self._pin(run)
            self._note_groups(run)

    def analyse(self, run: Run, calibration: CalibrationRun, tokens: torch.Tensor, folder: Path) -> None:
        """Choose the mixed precision of least predicted loss within the budget."""
        if run.plan.given:
            return
        budget = self.budget(run, tokens, folder)
        limit = limit_of(run, budget, self.config)
        shared = limit.plan()
        if self.config.search:
            shared = self._search(run, budget, shared, limit, tokens, folder)
        run.plan.shared_out = True
        if not any(shared.specs.values()):  # all fits as it is
            self._keep_head(run, shared)
        for name, spec in shared.specs.items():
            run.plan.specs[name] = spec
            run.plan.remark(name, _remark(shared, name, of_all=run.container is not None))
        run.report.notes.append(
            f"{budget.average(shared):.3f} bits a weight in mixed precision; predicted KL divergence {shared.loss:.3g}"
        )

    def budget(self, run: Run, tokens: torch.Tensor, folder: Path) -> Budget:
        """Return what every linear could be stored as, with losses measured now or in an earlier run."""

        def losses(specs: dict[str, list[QuantSpec]]) -> Losses:
            estimator: Estimator = self.config.estimator
            tables = {name: found for name, found in specs.items() if name not in run.graph.linears}
            return kept_losses(
                run, tokens, estimator, specs,
                lambda: measure(estimator, run, tokens, folder, lambda linear: specs[linear.name], tables),
            )  # fmt: skip

        return self._budget(run, losses)

    def _budget(self, run: Run, losses: Callable[[dict[str, list[QuantSpec]]], Losses]) -> Budget:
        specs = {name: self._candidates(linear, run.plan.specs[name]) for name, linear in run.graph.linears.items()}
        tables = table_shapes(run) if self.config.head_bits == "auto" else {}
        for name, shape in tables.items():
            specs[name] = self._table_candidates(shape)
        self._check_formats(spec for found in specs.values() for spec in found)
        kept = {name: _kept_bits(run, linear.weight_name, linear.weights) for name, linear in run.graph.linears.items()}
        kept |= {name: _kept_bits(run, name, n * k) for name, (n, k) in tables.items()}
        rated = with_wide_rows(losses({name: found for name, found in specs.items() if found}))
        run.plan.salience = rated.salience
        stored = run.container.tensor_bits if run.container is not None and self.config.size is not None else None
        return Budget(run.graph, rated, kept, self._rules(run), tables, self._uniform(run, tables), stored)

    def _table_candidates(self, shape: tuple[int, int]) -> list[QuantSpec]:
        if self._own_grids is not None:
            return self._own_grids.candidates(shape)
        return candidates.of_table(self._uniform_spec(self.config.bits, shape), shape, self.config.any_group)

    @property
    def _own_grids(self) -> Runtime | None:
        """The target, where it has grids of its own."""
        runtime = self.config.runtime
        return runtime if runtime is not None and runtime.codes else None

    def _uniform(self, run: Run, tables: dict[str, tuple[int, int]]) -> dict[int, dict[str, QuantSpec]]:
        """By width, what `--bits` alone gives every linear and table."""
        shapes = {name: linear.shape for name, linear in run.graph.linears.items() if run.plan.specs[name] is not None}
        shapes |= tables
        if self._own_grids is not None:
            return {bits: self._of_width(bits, shapes) for bits in candidates.CANDIDATE_BITS}
        base = {name: spec for name in run.graph.linears if (spec := run.plan.specs[name]) is not None}
        base |= {name: self._uniform_spec(self.config.bits, shape) for name, shape in tables.items()}
        widths = candidates.CANDIDATE_BITS
        return {bits: {name: replace(spec, bits=bits) for name, spec in base.items()} for bits in widths}

    def _of_width(self, bits: int, shapes: dict[str, tuple[int, int]]) -> dict[str, QuantSpec]:
        found = {name: self._spec(bits, shape) for name, shape in shapes.items()}
        return {name: spec for name, spec in found.items() if spec is not None}

    def _check_formats(self, specs: Iterable[QuantSpec]) -> None:
        known = dict.fromkeys(map(format_label, specs))
        unknown = [label for label in self.config.labels if label not in known]
        if unknown:
            near = get_close_matches(unknown[0], known, n=NEAREST, cutoff=0.0)
            raise UsageError(
                f"no layer can be stored as {unknown[0]}; choose from the {len(known)} formats that --group-size, "
                f"--symmetric and --sparsity allow, such as {', '.join(near)}."
            )

    @staticmethod
    def _without_losses(specs: dict[str, list[QuantSpec]]) -> Losses:
        return Losses({name: [Candidate(spec, 0.0) for spec in found] for name, found in specs.items()})

    def _search(
        self, run: Run, budget: Budget, plan: Shared, limit: Limit, tokens: torch.Tensor, folder: Path
    ) -> Shared:
        config = self.config
        planned = {name: spec and spec.to_dict() for name, spec in run.plan.specs.items()}
        question = {"avg_bits": config.avg_bits, "size": config.size, "planned": planned}
        refined = refine(run, tokens, folder, budget, plan, limit.fits, config.search, **question)
        run.report.notes.append(refined.note)
        return refined.plan

    def _rules(self, run: Run) -> Rules:
        config = self.config
        runtime = config.runtime
        if runtime is None:
            return Rules(config.pins, self.config.labels)
        taken = runtime.formats(config.symmetric)
        refused = [label for label in self.config.labels if label not in taken]
        if refused:
            raise UsageError(f"{config.target} does not load {refused[0]}; it loads {', '.join(taken)}.")
        return Rules(config.pins, self.config.labels or taken, runtime.fused)

    def _candidates(self, linear: Linear, spec: QuantSpec | None) -> list[QuantSpec]:
        sparse = self.config.sparsity is not None
        if spec is None:
            return []
        if self._own_grids is not None:
            return self._own_grids.candidates(linear.shape)
        found = candidates.of_linear(spec, linear, self.config.any_group, sparse)
        return [*found, *candidates.of_labels(self.config.labels, spec, linear.shape)]

    def _everywhere(self) -> QuantSpec | None:
        """Return the one format allowed, which every layer then has; None with a budget, or bits that contradict it."""
        config = self.config
        if config.has_budget or len(config.formats) != 1:
            return None
        spec = spec_of_label(config.formats[0])
        if spec is None:
            raise UsageError(
                f"no layer can be stored as {config.formats[0]}; pass --formats w4g128, nf4-g64, mxfp4 or another."
            )
        fits = config.group_size in (None, spec.group_size) and config.symmetric <= spec.symmetric
        return spec if spec.bits == config.bits and fits else None

    def _refuse_without_budget(self) -> None:
        if self.config.search:
            raise UsageError("--search refines the plan of a budget, and there is none; pass --avg-bits or --size.")
        if self.config.sparsity is not None:
            raise UsageError(
                "--sparsity auto chooses within a budget, and there is none; pass --avg-bits, or a share such as 0.2."
            )

    @property
    def _packs_head(self) -> bool:
        """Whether the default is 8 bits. Which formats a target takes for the two is known of its own grids alone."""
        config = self.config
        other = config.formats or (config.target and self._own_grids is None)
        return not other and (config.has_budget or config.bits <= MOST_BLOCK_BITS)

    def _plan_head(self, run: Run) -> None:
        config = self.config
        if isinstance(config.head_bits, int):
            for name, shape in table_shapes(run).items():
                run.plan.specs[name] = self._spec(config.head_bits, shape)
        elif config.head_bits is None and self._packs_head:
            specs = default_specs(run)
            if self._own_grids is not None:
                shapes = {name: run.source.model.get_parameter(name).shape for name in specs}
                specs = self._of_width(DEFAULT_BITS, {name: (shape[0], shape[1]) for name, shape in shapes.items()})
            run.plan.specs.update(specs)

    def _keep_head(self, run: Run, shared: Shared) -> None:
        """Leave a head that only the default would round as it is too, where the size allows that."""
        config, head = self.config, [name for name in run.plan.specs if name in run.graph.outside_weights]
        kept = {**run.plan.specs, **shared.specs, **dict.fromkeys(head)}
        if config.head_bits is None and (config.size is None or output_bytes(run, kept) <= config.size):
            run.plan.specs.update(dict.fromkeys(head))

    def _check_head(self) -> None:
        config = self.config
        if config.head_bits != "auto":
            return
        if config.size is None:
            raise UsageError("--head-bits auto chooses within a size, and there is none; pass --size, or 2 to 8 bits.")
        if config.search:
            raise UsageError("--search looks at the blocks alone, and --head-bits is auto; remove one of them.")
        if config.estimator != "fisher":
            raise UsageError(
                f"--head-bits auto needs the estimator fisher, and the recipe has {config.estimator}; pass 2 to 8 bits."
            )

    def _pin(self, run: Run) -> None:
        rules = self._rules(run)
        rules.check(run.graph.linears)
        for name, linear in run.graph.linears.items():
            pinned = rules.pinned(name)
            if pinned is not None:
                run.plan.specs[name] = None if pinned == KEPT_BITS else self._spec(pinned, linear.shape)
            spec = run.plan.specs[name]
            if spec is not None and not rules.allows(name, spec):
                raise UsageError(
                    f"{name} would be stored as {format_label(spec)}, but only {', '.join(rules.formats)} may be used; "
                    "change --bits and --group-size, or pass --avg-bits to have formats chosen."
                )

    def _spec(self, bits: int, shape: tuple[int, int]) -> QuantSpec | None:
        """None where a target has no block that divides the rows."""
        if self._own_grids is not None:
            return self._own_grids.of_width(bits, shape)
        return self._uniform_spec(bits, shape)

    def _uniform_spec(self, bits: int, shape: tuple[int, int]) -> QuantSpec:
        config = self.config
        along = shape[1] if config.grouping == "per_oc" else shape[0]
        group = config.group_size if config.group_size is not None else best_group_size(along)
        return QuantSpec(bits, group, config.grouping, config.symmetric)

    def _note_groups(self, run: Run) -> None:
        everywhere = self._everywhere()
        if everywhere is not None:
            uneven = sum(not everywhere.grid.divides(linear.shape[1]) for linear in run.graph.linears.values())
            if uneven:
                blocks = f"blocks of {everywhere.group_size} do not divide their rows"
                run.report.notes.append(f"{plural(uneven, 'layer')} stay floats: {blocks}")
            return
        if self._own_grids is not None:
            self._note_blocks(run)
            return
        sizes = {spec.group_size for spec in run.plan.specs.values() if spec is not None}
        if self.config.group_size is None and sizes - {DEFAULT_GROUP}:
            found = ", ".join(str(size) for size in sorted(sizes))
            run.report.notes.append(f"group sizes {found}: {DEFAULT_GROUP} does not divide every width of this model")

    @staticmethod
    def _note_blocks(run: Run) -> None:
        """Say where rows are too short for the blocks of the others, as llama.cpp's quantizer does in silence."""
        blocks = {spec.group_size for spec in run.plan.specs.values() if spec is not None}
        uneven = [name for name, linear in run.graph.linears.items() if linear.shape[1] % LARGE_BLOCK]
        kept = [name for name in run.graph.linears if run.plan.specs[name] is None]
        if uneven and len(uneven) > len(kept) and run.container is None:  # of a file every tensor is known
            run.report.notes.append(
                f"{plural(len(uneven), 'layer')} have blocks of {min(blocks)}: {LARGE_BLOCK} does not divide their rows"
            )
        if kept:
            run.report.notes.append(f"{plural(len(kept), 'layer')} stay floats: no block divides their rows")


def _remark(shared: Shared, name: str, of_all: bool) -> str:
    """Return what a plan predicts of a weight. of_all: with its share of the loss of all."""
    share = f", {shared.losses[name] / shared.loss:.2%} of the plan's" if of_all and shared.loss else ""
    return f"predicted to add {shared.losses[name]:.2g} to the KL divergence{share}"


def _kept_bits(run: Run, name: str, weights: int) -> int:
    """Return the stored bits of a tensor that stays as it is."""
    return 8 * run.source.stored_dtype(name).itemsize * weights
