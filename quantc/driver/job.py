"""One run on a page: `Job.build` takes a model from its settings to a checkpoint, a step a line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..calibration.tokens import NO_TEXT, calibration_tokens
from ..checkpoint.writer import CheckpointWriter
from ..errors import ModelError, UsageError, as_option
from ..files.whole_file import json_text
from ..frontend import Source, open_model, to_meta
from ..frontend.companions import tokenizer_files
from ..frontend.source import PathLike
from ..graph.derive import derive
from ..graph.model_graph import ModelGraph
from ..kernels.cuda.gram import products_for
from ..kernels.rounding import panel_for
from ..machine.devices import usable_device
from ..numerics.basis import Rounding
from ..passes.allocate import Allocate
from ..pipeline.base import Pass, check_order
from ..pipeline.run import Container, Run
from ..pipeline.sweep import sweep_of
from ..plan import Plan
from ..planning.budget import Budget, Shared
from ..planning.sizes import disk_bytes
from ..progress import LogProgress, Progress
from ..recipe import Recipe
from ..report import Report
from .metadata import PLAN_FILE, finish_weights, write_companions, write_metadata
from .resume import finished_blocks, identity
from .settings import (
    ANY_SIZE,
    BUDGETS,
    Settings,
    allocation,
    check_combination,
    chosen_recipe,
    given_plan,
    named_recipe,
    running_passes,
)

REQUEST_FILE = "request.json"


@dataclass
class Job:
    """What a run is to do, before a model is opened."""

    recipe: Recipe
    passes: list[Pass]
    plan: Plan
    notes: list[str]
    device: str
    progress: Progress
    given: tuple[torch.Tensor, str] | None = None  # the calibration set, and what it is
    trusted: bool = False  # whether code that the model brings may be run
    request: dict[str, Any] | None = None  # what a checkpoint says that it was made for, beside its weights
    container: Callable[[Run], Container] | None = None  # of the file that the checkpoint is made into
    predicted: Shared = field(default_factory=lambda: Shared({}, {}, 0))  # what planning says of a plan it has made

    @classmethod
    def of(cls, settings: Settings, plan: PathLike | None, device: str, progress: Progress | None) -> Job:
        """Return the job that settings ask for; raises UsageError or PassError for what cannot be had together."""
        recipe = chosen_recipe(settings)
        specs = given_plan(plan, settings)
        passes, notes = running_passes(recipe, settings.get("method"))
        check_order(passes, planned=plan is not None)
        check_combination(passes)
        trusted = settings.get("trust_remote_code", False)
        return cls(recipe, passes, specs, notes, device, progress or LogProgress(), trusted=trusted)

    @classmethod
    def of_any_size(cls, settings: Settings, device: str, progress: Progress | None) -> Job:
        """Return one with a budget that holds any plan, not the recipe's; raises UsageError where settings have one."""
        given = next((name for name in ("bits", *BUDGETS) if settings.get(name) is not None), None)
        if given is not None:
            raise UsageError(f"every size is looked at, so {as_option(given)} changes nothing; remove it.")
        recipe = named_recipe(settings).without("allocate", *BUDGETS, "search")
        return cls.of({**settings, "recipe": recipe, "preset": None, "size": ANY_SIZE}, None, device, progress)

    def within(self, size: int) -> Job:
        """Return the same with another size as its budget."""
        recipe = self.recipe.with_settings(allocate={"size": size})
        return replace(self, recipe=recipe, passes=running_passes(recipe, None)[0])

    def planned(self, plan: Plan, tokens: torch.Tensor, calibration: str) -> Job:
        """Return the same with the specs of a plan and no budget, and this calibration set (samples, T)."""
        recipe = self.recipe.without("allocate", *BUDGETS)
        plan = Plan(plan.specs, shared_out=True, salience=plan.salience)
        passes = running_passes(recipe, None)[0]
        return replace(self, recipe=recipe, passes=passes, plan=plan, given=(tokens, calibration))

    def source(self, model: PathLike) -> Source:
        """Return the model, opened."""
        return open_model(model, self.trusted)

    def open(self, source: Source, output: str) -> Run:
        """Return the run on a model as far as its plan: the first steps of `build`."""
        graph = derive(source.model, source.load_for_tokens, to_meta)
        run = self._make_run(source, graph, output)
        self._plan(run)
        return run

    def build(
        self,
        source: Source,
        folder: Path,
        force: bool = False,
        resume: bool = False,
        resumable: bool = True,
        output: str = "",
        at_most: int | None = None,
    ) -> Report:
        """Write the checkpoint, from the opened model to the folder's last name.

        resume: continue an interrupted build, if there is one. resumable: whether this one leaves what that needs.
        output: where the checkpoint will be in the end. at_most: bytes of the weight files, or of the file that they
        are made into; where they are more, as the report says then, no checkpoint is left.
        """
        started = time.perf_counter(), time.process_time()
        with CheckpointWriter(folder, force, resume, resumable) as writer:
            graph = derive(source.model, source.load_for_tokens, to_meta)  # runs one block of each kind
            run = self._make_run(source, graph, output or str(folder))
            self._plan(run)  # every pass, by numbers alone; the plan is checked against the graph
            self._check_tokenizer(run)
            writer.require_space(disk_bytes(run, run.plan.specs))
            tokens = self.tokens(run) if self.needs_tokens else None
            facts = identity(run, self.recipe.to_dict(), tokens, size=at_most)
            saved = finished_blocks(writer, run, self.passes, facts)
            if self.request is not None:
                writer.add_text(REQUEST_FILE, json_text(self.request) + "\n")
            write_companions(run, writer)  # what is wrong with these is found before hours of work
            sweep = sweep_of(run, self.passes, tokens, writer, saved)  # the original model's states at the first block
            sweep.analyse()  # every pass sees the original model, before any block is changed
            sweep.take_up()  # after analyse, whose plan finished blocks may have changed
            sweep.build_outside()
            sweep.build_blocks()
            sweep.finish()  # on the whole model, as it was written
            writer.add_text(PLAN_FILE, run.plan.to_yaml())
            finish_weights(run, writer, started)
            if at_most is None or run.report.weights_bytes <= at_most:
                config, manifest = write_metadata(run, self.recipe.to_dict(), tokens, writer)
                writer.commit(config, manifest)
        return run.report

    @property
    def needs_tokens(self) -> bool:
        """Whether a build runs the model on a calibration set."""
        return self.given is not None or self._calibrated

    @property
    def _calibrated(self) -> bool:
        return any(item.calibrated for item in self.passes)

    def _make_run(self, source: Source, graph: ModelGraph, output: str) -> Run:
        for note in source.notes:
            self.progress.note(note)
        report = Report(model=source.name, output=output, notes=[*self.notes, *source.notes])
        report.calibration = NO_TEXT if self.recipe.calibration.source == NO_TEXT else ""
        report.kept = {item.name: item.keep for block in graph.blocks for item in block.linears if item.keep}
        device = usable_device(self.device)
        rounding = next((item.rounding for item in self.passes if item.rounding), Rounding())
        rounding = replace(rounding, panel=panel_for(device))
        plan = self.plan.copy()  # a job may be built again
        run = Run(source, graph, plan, report, self.progress, device, rounding, products_for(device))
        config = allocation(self.passes)
        run.target = None if config is None else config.target
        run.container = None if self.container is None else self.container(run)
        return run

    def _plan(self, run: Run) -> None:
        for item in self.passes:
            item.plan(run)
        run.plan.check(run.graph, set(run.graph.outside_weights))
        if run.container is not None:
            run.container.check(run.plan.specs)

    def _check_tokenizer(self, run: Run) -> None:
        """Find a missing tokenizer before hours of work; runs that need no text do without."""
        try:
            _ = run.source.tokenizer
        except ModelError as error:
            if self._calibrated:
                raise
            copied = bool(tokenizer_files(run.source.path, saved=False))
            what = "the tokenizer's files are copied unread" if copied else "the checkpoint has no tokenizer"
            run.report.notes.append(f"{what}: {error}".removesuffix("."))

    def budget(self, run: Run, tokens: torch.Tensor, folder: Path) -> Budget:
        """Return what the linears could be stored as. folder: for temporary files."""
        (allocate,) = (item for item in self.passes if isinstance(item, Allocate))
        return allocate.budget(run, tokens, folder)

    def tokens(self, run: Run) -> torch.Tensor:
        """Return the calibration set (samples, T), and say in the report what it is."""
        if self.given is not None:
            tokens, run.report.calibration = self.given
            return tokens
        drawn = calibration_tokens(run.source, self.recipe.calibration)
        run.report.calibration = drawn.described
        run.report.notes += drawn.notes
        run.source.check_values(self.progress)
        return drawn.tokens
