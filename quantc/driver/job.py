"""A run before its model: settings become a recipe, passes, a plan; with a model they become a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..calibration.tokens import NO_TEXT, calibration_tokens
from ..checkpoint.shards import writing
from ..checkpoint.writer import CheckpointWriter
from ..errors import ModelError, UsageError
from ..frontend import Source, open_model, to_meta
from ..frontend.source import PathLike
from ..graph.derive import derive
from ..kernels.cuda.gptq import panel_for
from ..kernels.cuda.gram import products_for
from ..numerics.basis import Rounding
from ..passes.allocate import Allocate
from ..pipeline import sweep
from ..pipeline.base import Pass, check_order
from ..pipeline.run import Run
from ..pipeline.snapshot import check_tensors, checked
from ..plan import Plan
from ..planning.budget import Budget
from ..planning.sizes import weights_bytes
from ..progress import LogProgress, Progress
from ..recipe import Recipe
from ..report import Report
from .identity import identity
from .metadata import PLAN_FILE, config_json, manifest_json, write_card, write_companions
from .settings import (
    ANY_SIZE,
    BUDGETS,
    Settings,
    _allocation,
    _build_passes,
    _check_combination,
    _device,
    _given_plan,
    _resolve_recipe,
    _sparsified,
    _trained,
    allocation,
)


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

    @classmethod
    def of(cls, settings: Settings, plan: PathLike | None, device: str, progress: Progress | None) -> Job:
        unknown = sorted(set(settings) - set(Settings.__annotations__))
        if unknown:
            raise UsageError(f"there is no setting {unknown[0]!r}; there are {', '.join(Settings.__annotations__)}.")
        method, allocate = settings.get("method"), _allocation(settings)
        kept = {key: settings.get(key) for key in ("samples", "seq_len", "seed")}
        chosen = _resolve_recipe(settings.get("recipe"), settings.get("preset"))
        if any(settings.get(name) is not None for name in ("bits", *BUDGETS)):  # what the recipe says is overridden
            chosen = chosen.without("allocate", *BUDGETS)
        chosen = _trained(_sparsified(chosen, settings), settings).with_settings(
            allocate=allocate,
            quantize={"method": method},
            calibration={"source": settings.get("calib"), **kept},
        )
        given_plan = _given_plan(plan, {**allocate, "sparsity": settings.get("sparsity")})
        passes, notes = _build_passes(chosen, method)
        check_order(passes, planned=plan is not None)
        _check_combination(passes)
        trusted = settings.get("trust_remote_code", False)
        return cls(chosen, passes, given_plan, notes, device, progress or LogProgress(), trusted=trusted)

    @classmethod
    def generous(cls, settings: Settings, device: str, progress: Progress | None) -> Job:
        """With a budget that holds any plan, in place of the recipe's; raises UsageError where settings have one."""
        given = next((name for name in ("bits", *BUDGETS) if settings.get(name) is not None), None)
        if given is not None:
            raise UsageError(f"{given} says how small the model is to be, but all sizes are looked at; leave it out.")
        recipe = _resolve_recipe(settings.get("recipe"), settings.get("preset")).without("allocate", *BUDGETS, "search")
        return cls.of({**settings, "recipe": recipe, "preset": None, "size": ANY_SIZE}, None, device, progress)

    def source(self, model: PathLike) -> Source:
        """The model, opened."""
        return open_model(model, self.trusted)

    def open(self, source: Source, output: str) -> Run:
        """The run on a model, planned as far as numbers say."""
        graph = derive(source.model, source.load, to_meta)
        for note in source.notes:
            self.progress.note(note)
        report = Report(model=source.name, output=output, notes=[*self.notes, *source.notes])
        report.calibration = NO_TEXT if self.recipe.calibration.source == NO_TEXT else ""
        rounding = next((item.rounding for item in self.passes if item.rounding), Rounding())
        plan = self.plan.copy()  # a job may be built again
        device = _device(self.device)
        rounding = replace(rounding, panel=panel_for(device))
        run = Run(source, graph, plan, report, self.progress, device, rounding, products_for(device))
        config = allocation(self.passes)
        run.target = config and config.target
        report.kept = {item.name: item.keep for block in graph.blocks for item in block.linears if item.keep}
        for item in self.passes:
            item.plan(run)
        run.plan.check(graph, set(graph.outside_weights))
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
        """Write the checkpoint.

        resume: continue an interrupted build, if there is one. resumable: whether this one leaves what that needs.
        output: where the checkpoint will lie in the end. at_most: bytes, or TooLarge is raised.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        with CheckpointWriter(folder, force, resume, resumable) as writer:
            run = self.open(source, output or str(folder))
            self._check_tokenizer(run)
            writer.require_space(weights_bytes(run, run.plan.specs))
            tokens = self.tokens(run)
            saved = checked(writer.begin(identity(run, self.recipe, tokens, size=at_most)), run, self.passes)
            if saved is not None:
                writer.restore(saved["tensors"], partial(check_tensors, saved, run))
            write_companions(run, writer)  # what is wrong with these is found before hours of work
            sweep.build(run, self.passes, tokens, writer, saved)
            writer.add_text(PLAN_FILE, run.plan.to_yaml())
            _finish_report(run, writer, started, cpu_started)
            if at_most is not None and writer.weights_bytes > at_most:
                writer.discard()
                raise TooLarge(writer.weights_bytes - at_most)
            write_card(run, writer)
            config = config_json(run)
            with run.source.unchanged:
                manifest = manifest_json(run, self.recipe, tokens, writer.folder, config)
            writer.commit(config, manifest)
        return run.report

    @property
    def _calibrated(self) -> bool:
        return any(item.calibrated for item in self.passes)

    def _check_tokenizer(self, run: Run) -> None:
        """Find a missing one before hours of work; what needs no text does without."""
        try:
            _ = run.source.tokenizer
        except ModelError as error:
            if self._calibrated:
                raise
            run.report.notes.append(f"the checkpoint has no tokenizer: {error}".removesuffix("."))

    def within(self, size: int) -> Job:
        """The same with another size as its budget."""
        recipe = self.recipe.with_settings(allocate={"size": size})
        return replace(self, recipe=recipe, passes=recipe.build_passes())

    def planned(self, plan: Plan, tokens: torch.Tensor, calibration: str) -> Job:
        """The same with the specs of a plan and no budget, and this calibration set (samples, T)."""
        recipe = self.recipe.without("allocate", *BUDGETS)
        plan = Plan(plan.specs, shared_out=True, salience=plan.salience)
        return replace(self, recipe=recipe, passes=recipe.build_passes(), plan=plan, given=(tokens, calibration))

    def budget(self, run: Run, tokens: torch.Tensor, folder: Path) -> Budget:
        """What the linears could be stored as. folder: for temporary files."""
        (allocate,) = (item for item in self.passes if isinstance(item, Allocate))
        return allocate.budget(run, tokens, folder)

    def tokens(self, run: Run) -> torch.Tensor | None:
        """The calibration set, where a pass asks for one."""
        if self.given is not None:
            tokens, run.report.calibration = self.given
            return tokens
        if not self._calibrated:
            return None
        drawn = calibration_tokens(run.source, self.recipe.calibration)
        run.report.calibration = drawn.described
        run.report.notes += drawn.notes
        run.source.check_values(self.progress)
        return drawn.tokens


class TooLarge(Exception):
    """A build takes so many bytes more than it may."""

    def __init__(self, excess: int):
        super().__init__(f"{excess} bytes too many")
        self.excess = excess


def _finish_report(run: Run, writer: CheckpointWriter, started: float, cpu_started: float) -> None:
    report = run.report
    report.weights_bytes = writer.finish_weights(run.progress)
    report.source_bytes = sum(file.stat().st_size for file in run.source.weight_files())
    report.count_costs(started, cpu_started)
    with writing(writer.folder):
        report.write(writer.folder)
