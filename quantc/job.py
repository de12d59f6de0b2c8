"""A run before its model: settings become a recipe, passes, a plan; with a model they become a checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from . import companions, pipeline, sweep
from .budget import Budget
from .checkpoint_writer import CheckpointWriter
from .derive import derive
from .errors import ModelError, UsageError
from .frontend import Source, open_model, to_meta
from .identity import identity
from .kernels.cuda.gptq import panel_for
from .kernels.cuda.gram import products_for
from .numerics.basis import Rounding
from .numerics.rounding import using_panel
from .passes.allocate import Allocate, AllocateConfig
from .passes.sparsify import Sparsify
from .passes.tune import Tune
from .pipeline import Pass, Run
from .plan import Plan, read_plan
from .presets import preset as named_preset
from .progress import LogProgress, Progress
from .recipe import DEFAULT, NO_TEXT, Recipe, read_recipe, without_text
from .report import Report
from .shard_writer import writing
from .sizes import weights_bytes
from .snapshot import check_tensors, checked
from .spec import QuantSpec
from .stats import using_products
from .tokens import calibration_tokens
from .units import parse_duration, parse_size, size

PathLike = str | os.PathLike[str]
BUDGETS = ("avg_bits", "size")  # of allocate
ANY_SIZE = 1 << 60  # bytes
AUTO = "auto"


class Settings(TypedDict, total=False):
    """What a run may be told besides the model and where to write; the command line's options of the same names.

    preset: fast, balanced or best. recipe: a Recipe or a YAML file instead; the other settings override either.
    bits: of every code; with a fraction it means avg_bits: what a weight inside the blocks takes on average, all that
    is stored counted. size: instead, bytes of the weight files, or text such as 300MiB. Both are shared out by
    predicted loss; pins: pattern of names -> bits, formats: the labels allowed, such as w4g128, and target: a runtime
    that has to load the result hold for that. search: generations that then refine the plan by measuring.
    sparsity: share of the groups of every linear that are dropped, or "2:4"; group_size then is theirs. auto, where
    there is a budget: it may drop some of any linear.
    tune_steps: of training for each block after rounding. tune_budget: wall seconds for that in all, or text such as
    10min; either adds the pass tune to a recipe without it.
    method: gptq or rtn. calib: builtin, self, a file or a data set; none rounds without calibration text.
    trust_remote_code: run Python code that the model's folder or repository brings.
    """

    preset: str | None
    recipe: Recipe | PathLike | None
    bits: float | None
    avg_bits: float | None
    size: int | str | None
    group_size: int | None
    symmetric: bool | None
    sparsity: float | Literal["2:4", "auto"] | None
    tune_steps: int | None
    tune_budget: float | str | None
    head_bits: int | Literal["auto"] | None
    pins: dict[str, int] | None
    formats: Sequence[str] | None
    target: str | None
    search: int | None
    method: str | None
    calib: str | None
    samples: int | None
    seq_len: int | None
    seed: int | None
    trust_remote_code: bool


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
        pipeline.check_order(passes, planned=plan is not None)
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
        run = Run(source, graph, plan, report, self.progress, _device(self.device), rounding)
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
            companions.write_companions(run, writer)  # what is wrong with these is found before hours of work
            with kernels_of(run.device):
                sweep.build(run, self.passes, tokens, writer, saved)
            writer.add_text(companions.PLAN_FILE, run.plan.to_yaml())
            _finish_report(run, writer, started, cpu_started)
            if at_most is not None and writer.weights_bytes > at_most:
                writer.discard()
                raise TooLarge(writer.weights_bytes - at_most)
            companions.write_card(run, writer)
            config = companions.config_json(run)
            with run.source.unchanged:
                manifest = companions.manifest_json(run, self.recipe, tokens, writer.folder, config)
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
        with kernels_of(run.device):
            return allocate.budget(run, tokens, folder)

    def tokens(self, run: Run) -> torch.Tensor | None:
        """The calibration set, where a pass asks for one."""
        if self.given is not None:
            tokens, run.report.calibration = self.given
            return tokens
        if not self._calibrated:
            return None
        tokens = calibration_tokens(run, self.recipe.calibration)
        run.source.check_values(self.progress)
        return tokens


class TooLarge(Exception):
    """A build takes so many bytes more than it may."""

    def __init__(self, excess: int):
        super().__init__(f"{excess} bytes too many")
        self.excess = excess


@contextmanager
def kernels_of(device: torch.device) -> Iterator[None]:
    """Inside, rounding and statistics use the kernels made for the device."""
    with using_panel(panel_for(device)), using_products(products_for(device)):
        yield


def _allocation(settings: Settings) -> dict[str, Any]:
    """The settings of allocate; None leaves what the recipe says."""
    limit, formats, bits = settings.get("size"), settings.get("formats"), settings.get("bits")
    for name in BUDGETS:
        if bits is not None and settings.get(name) is not None:
            raise UsageError(
                f"bits is {bits:g}, and {name}, which is shared out, is {settings.get(name)}; leave one of them out."
            )
    kept = {key: settings.get(key) for key in ("group_size", "symmetric", "head_bits", "pins", "target", "search")}
    kept["sparsity"] = AUTO if settings.get("sparsity") == AUTO else None
    return {
        **_widths(bits, settings.get("avg_bits")),
        **kept,
        "size": None if limit is None else as_bytes(limit),
        "formats": None if formats is None else tuple(formats),
    }


def as_bytes(limit: int | str) -> int:
    """Bytes, of a number of them or of text such as 300MiB."""
    return parse_size(limit) if isinstance(limit, str) else limit


def _widths(bits: float | None, avg_bits: float | None) -> dict[str, Any]:
    """allocate's bits and avg_bits; bits with a fraction are an average."""
    if bits is None or bits == int(bits):
        return {"bits": None if bits is None else int(bits), "avg_bits": avg_bits}
    return {"bits": None, "avg_bits": bits}


def _resolve_recipe(recipe: Recipe | PathLike | None, preset: str | None) -> Recipe:
    if preset is not None:
        if recipe is not None:
            raise UsageError("a preset is a recipe, so both cannot be given; leave one of them out.")
        return named_preset(preset)
    if isinstance(recipe, Recipe):
        return recipe
    return DEFAULT if recipe is None else read_recipe(Path(recipe))


def _sparsified(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the pass sparsify where a sparsity is asked for; a group size is that of the groups dropped."""
    sparsity = settings.get("sparsity")
    if sparsity == AUTO:  # is for allocate
        return recipe
    if sparsity is not None:
        recipe = recipe.including(Sparsify.name, before="quantize")
    if all(name != Sparsify.name for name, _ in recipe.passes):
        return recipe
    return recipe.with_settings(sparsify={"sparsity": sparsity, "group_size": settings.get("group_size")})


def _trained(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the pass tune where steps or a budget for it are asked for."""
    steps, budget = settings.get("tune_steps"), settings.get("tune_budget")
    if steps is None and budget is None:
        return recipe
    seconds = parse_duration(budget) if isinstance(budget, str) else budget
    return recipe.including(Tune.name).with_settings(tune={"steps": steps, "budget": seconds})


def _build_passes(recipe: Recipe, method: str | None) -> tuple[list[Pass], list[str]]:
    """The passes that run, and notes on those that do not, or not as the recipe says."""
    passes = recipe.build_passes()
    if recipe.calibration.source != NO_TEXT:
        return passes, []
    if method == "gptq":
        raise UsageError("gptq needs calibration text, and there is none; leave the method out, or give a text.")
    return without_text(passes)


def _check_combination(passes: list[Pass]) -> None:
    """Raise UsageError where passes ask for what cannot be had together, or what a target does not load."""
    config = allocation(passes)
    target = config and config.target
    sparse = any(isinstance(item, Sparsify) for item in passes)
    automatic = config is not None and config.sparsity == AUTO
    if config is not None and sparse and (config.has_budget or automatic):
        raise UsageError(
            "a budget is shared out linear by linear, and the pass sparsify drops weights of every linear alike; pass "
            "--bits instead of a budget, or --sparsity auto instead of the pass."
        )
    if target is not None and (sparse or automatic):
        raise UsageError(f"{target} loads no linears of which weights are dropped; leave the sparsity out.")
    if target is not None and any(item.name == "rotate" for item in passes):
        raise UsageError(
            f"{target} rotates nothing at inference, and the recipe has the pass rotate; pass --preset fast, or a "
            "recipe without it."
        )


def _given_plan(plan: PathLike | None, settings: dict[str, Any]) -> Plan:
    if plan is None:
        return Plan()
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise UsageError(
            f"a plan says how every linear is stored, so {' and '.join(given)} cannot be given with it; edit the plan."
        )
    return read_plan(Path(plan))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"the device {name!r} cannot be used here ({reason}); choose cpu or another device."
        ) from error
    return device


def allocation(passes: list[Pass]) -> AllocateConfig | None:
    """The settings of allocate; None in a recipe without it, whose plan is handed in."""
    return next((item.config for item in passes if isinstance(item, Allocate)), None)


def default_name(model: str, passes: list[Pass], plan: Plan) -> str:
    """`<model>-quantc-w4g128`, or `-plan` where a plan was given."""
    allocate = allocation(passes)
    if plan.specs or allocate is None:
        return f"{model}-quantc-plan"
    group = 128 if allocate.group_size is None else allocate.group_size
    if allocate.avg_bits is not None:
        return f"{model}-quantc-{allocate.avg_bits:g}bits"
    if allocate.size is not None:
        return f"{model}-quantc-{size(allocate.size).replace(' ', '')}"
    spec = QuantSpec(allocate.bits, group, allocate.grouping, allocate.symmetric)
    for item in passes:
        spec = item.config.sparse(spec) if isinstance(item, Sparsify) else spec
    return f"{model}-quantc-{spec.label()}"


def _finish_report(run: Run, writer: CheckpointWriter, started: float, cpu_started: float) -> None:
    report = run.report
    report.weights_bytes = writer.finish_weights(run.progress)
    report.source_bytes = sum(file.stat().st_size for file in run.source.weight_files())
    report.count_costs(started, cpu_started)
    with writing(writer.folder):
        report.write(writer.folder)
