"""The whole run on one page: quantize(), load(), evaluate()."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import companions, pipeline
from .blocks import find_blocks
from .checkpoint import CheckpointReader, is_checkpoint
from .checkpoint import verify as verify_checkpoint
from .checkpoint_writer import CheckpointWriter
from .derive import derive
from .errors import UsageError
from .frontend import Source, open_model, to_meta
from .frontend.source import quiet_transformers, tensors_under
from .kernels.cuda.gptq import panel_for
from .kernels.cuda.gram import products_for
from .memory import peak_rss_bytes
from .numerics.basis import Rounding
from .numerics.rounding import using_panel
from .pipeline import Pass, Run
from .plan import Plan, read_plan
from .presets import preset as named_preset
from .progress import LogProgress, Progress
from .recipe import DEFAULT, NO_TEXT, Recipe, read_recipe, without_text
from .report import Report
from .shard_writer import writing
from .sizes import weights_bytes
from .spec import QuantSpec
from .stats import using_products
from .tokens import calibration_tokens
from .units import parse_size

if TYPE_CHECKING:
    from .evaluation import Evaluation

PathLike = str | os.PathLike[str]


class Settings(TypedDict, total=False):
    """What a run may be told besides the model and where to write; the command line's options of the same names.

    preset: fast, balanced or best. recipe: a Recipe or a YAML file instead; the other settings override either.
    bits: of every code; with a fraction it means avg_bits: what a weight inside the blocks takes on average, all that
    is stored counted. size: instead, bytes of the weight files, or text such as 300MiB. Both are shared out by
    predicted loss; pins: pattern of names -> bits, formats: the labels allowed, such as w4g128, and target: a runtime
    that has to load the result hold for that.
    method: gptq or rtn. calib: builtin, self, a file or a data set; none rounds without calibration text.
    """

    preset: str | None
    recipe: Recipe | PathLike | None
    bits: float | None
    avg_bits: float | None
    size: int | str | None
    group_size: int | None
    symmetric: bool | None
    head_bits: int | None
    pins: dict[str, int] | None
    formats: Sequence[str] | None
    target: str | None
    method: str | None
    calib: str | None
    samples: int | None
    seq_len: int | None
    seed: int | None


def quantize(
    model: PathLike,
    *,
    out: PathLike | None = None,
    plan: PathLike | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Quantize a model into a packed checkpoint and return the report.

    model: folder, .gguf file, hub id or demo name. out: output folder, `<model>-quantc-w4g128` or so by default.
    plan: a plan.yaml whose specs are used as they are. settings: see Settings. Raises a QuantcError whose message is
    one sentence; nothing is left behind then.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    job = _Job.of(plan, settings)
    source = open_model(model)
    folder = Path(out) if out is not None else Path(default_name(source.name, job.passes, job.plan))
    with CheckpointWriter(folder, force) as writer:
        run = job.open(source, str(folder), progress, device)
        writer.require_space(weights_bytes(run, run.plan.specs))
        tokens = job.tokens(run)

        with using_panel(panel_for(run.device)), using_products(products_for(run.device)):
            pipeline.build(run, job.passes, tokens, writer)

        companions.write_companions(run, writer)
        _finish_report(run, writer, started, cpu_started)
        writer.commit(companions.config_json(run), companions.manifest_json(run, job.recipe, tokens))
    return run.report


def plan(
    model: PathLike,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Run:
    """How a model would be stored within a budget: the run as far as its plan, with a report; nothing is rounded.

    settings: as in `quantize`, which takes the plan (`result.plan.to_yaml()`) back.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    job = _Job.of(None, settings)
    if not any(item.name == "allocate" and item.analyses for item in job.passes):
        raise UsageError("a plan shares out a budget, and none was given; pass --avg-bits or --size.")
    run = job.open(open_model(model), "", progress, device)
    tokens = job.tokens(run)
    assert tokens is not None, "a budget needs calibration text, and allocate has refused to do without"
    with (
        tempfile.TemporaryDirectory(prefix="quantc-plan-") as folder,
        using_panel(panel_for(run.device)),
        using_products(products_for(run.device)),
    ):
        pipeline.analyse(run, [item for item in job.passes if item.name == "allocate"], tokens, Path(folder))
    run.report.wall_seconds = time.perf_counter() - started
    run.report.cpu_seconds = time.process_time() - cpu_started
    run.report.peak_rss_bytes = peak_rss_bytes()
    return run


@dataclass
class _Job:
    """What a run is to do, before a model is opened."""

    recipe: Recipe
    passes: list[Pass]
    plan: Plan
    notes: list[str]

    @classmethod
    def of(cls, plan: PathLike | None, settings: Settings) -> _Job:
        unknown = sorted(set(settings) - set(Settings.__annotations__))
        if unknown:
            raise UsageError(f"there is no setting {unknown[0]!r}; there are {', '.join(Settings.__annotations__)}.")
        method, allocate = settings.get("method"), _allocation(settings)
        kept = {key: settings.get(key) for key in ("samples", "seq_len", "seed")}
        chosen = _resolve_recipe(settings.get("recipe"), settings.get("preset")).with_settings(
            allocate=allocate,
            quantize={"method": method},
            calibration={"source": settings.get("calib"), **kept},
        )
        given_plan = _given_plan(plan, *allocate.values())
        passes, notes = _build_passes(chosen, method)
        pipeline.check_order(passes, planned=plan is not None)
        return cls(chosen, passes, given_plan, notes)

    def open(self, source: Source, output: str, progress: Progress | None, device: str) -> Run:
        """The run on a model, planned as far as numbers say."""
        graph = derive(source.model, source.load, to_meta)
        report = Report(model=source.name, output=output, notes=self.notes)
        report.calibration = NO_TEXT if self.recipe.calibration.source == NO_TEXT else ""
        rounding = next((item.rounding for item in self.passes if item.rounding), Rounding())
        run = Run(source, graph, self.plan, report, progress or LogProgress(), _device(device), rounding)
        report.kept = {item.name: item.keep for block in graph.blocks for item in block.linears if item.keep}
        for item in self.passes:
            item.plan(run)
        run.plan.check(graph, set(graph.outside_weights))
        return run

    def tokens(self, run: Run) -> torch.Tensor | None:
        """The calibration set, where a pass asks for one."""
        calibrated = any(item.calibrated for item in self.passes)
        return calibration_tokens(run, self.recipe.calibration) if calibrated else None


def _allocation(settings: Settings) -> dict[str, Any]:
    """The settings of allocate; None leaves what the recipe says."""
    size, formats = settings.get("size"), settings.get("formats")
    kept = {key: settings.get(key) for key in ("group_size", "symmetric", "head_bits", "pins", "target")}
    return {
        **_widths(settings.get("bits"), settings.get("avg_bits")),
        **kept,
        "size": parse_size(size) if isinstance(size, str) else size,
        "formats": None if formats is None else tuple(formats),
    }


def _widths(bits: float | None, avg_bits: float | None) -> dict[str, Any]:
    """allocate's bits and avg_bits; bits with a fraction are an average."""
    if bits is None or bits == int(bits):
        return {"bits": None if bits is None else int(bits), "avg_bits": avg_bits}
    if avg_bits is not None:
        raise UsageError(f"bits is {bits:g}, which is an average, and avg_bits is {avg_bits:g}; leave one of them out.")
    return {"bits": None, "avg_bits": bits}


def load(
    path: PathLike, *, dtype: torch.dtype | None = None, device: str = "cpu", verify: bool = False
) -> PreTrainedModel:
    """A packed checkpoint as a transformers model that runs on packed weights.

    dtype: of activations and of what is not quantized; None is the model's own. verify: also check every checksum.
    Raises CheckpointError that names the tensor for a truncated, missing, changed or unknown one.
    """
    if verify:
        verify_checkpoint(path)
    else:
        CheckpointReader(path)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    return model.eval().to(device)


def evaluate(
    model: PathLike,
    *,
    text: str,
    against: PathLike | None = None,
    context: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model or checkpoint on a text, and its divergence from the original `against`.

    text: a file or the name of a data set. context: tokens per window, 512 or the model's own limit if that is less.
    dtype: float32, bfloat16 or float16; None is the model's own.
    See evaluation.py for the protocol.
    """
    from . import evaluation

    wanted = _dtype(dtype)
    tokenizer = _tokenizer(model)
    documents = evaluation.read_text(text)
    subject = _load_any(model, wanted).to(device)
    cut = evaluation.make_windows(tokenizer, documents, context or default_context(subject), stride, windows)
    original = None if against is None else _load_any(against, wanted).to(device)
    scores = evaluation.score(subject, original, cut, progress or LogProgress())
    stored = _stored_size(model)
    return evaluation.summarize(scores, subject, tokenizer, **stored)


def default_name(model: str, passes: list[Pass], plan: Plan) -> str:
    """`<model>-quantc-w4g128`, or `-plan` where a plan was given."""
    allocate = next((item.config for item in passes if item.name == "allocate"), None)
    if plan.specs or allocate is None:
        return f"{model}-quantc-plan"
    group = 128 if allocate.group_size is None else allocate.group_size
    if allocate.avg_bits is not None:
        return f"{model}-quantc-{allocate.avg_bits:g}bits"
    return f"{model}-quantc-{QuantSpec(allocate.bits, group, allocate.grouping, allocate.symmetric).label()}"


def default_context(model: PreTrainedModel) -> int:
    """512 tokens, or as many as the model has positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(512, limit) if isinstance(limit, int) else 512


def _resolve_recipe(recipe: Recipe | PathLike | None, preset: str | None) -> Recipe:
    if preset is not None:
        if recipe is not None:
            raise UsageError("a preset is a recipe, so both cannot be given; leave one of them out.")
        return named_preset(preset)
    if isinstance(recipe, Recipe):
        return recipe
    return DEFAULT if recipe is None else read_recipe(Path(recipe))


def _build_passes(recipe: Recipe, method: str | None) -> tuple[list[Pass], list[str]]:
    """The passes that run, and notes on those that do not, or not as the recipe says."""
    passes = recipe.build_passes()
    if recipe.calibration.source != NO_TEXT:
        return passes, []
    if method == "gptq":
        raise UsageError("gptq needs calibration text, and there is none; leave the method out, or give a text.")
    return without_text(passes)


def _given_plan(plan: PathLike | None, *settings: object) -> Plan:
    if plan is None:
        return Plan()
    if any(value is not None for value in settings):
        raise UsageError("a plan says how every linear is stored; leave out bits, group size, symmetry and head bits.")
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


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise UsageError(f"the dtype {name!r} is unknown; choose one of {', '.join(known)}.")
    return None if name is None else known[name]


def _finish_report(run: Run, writer: CheckpointWriter, started: float, cpu_started: float) -> None:
    report = run.report
    report.weights_bytes = writer.finish_weights()
    report.source_bytes = sum(file.stat().st_size for file in run.source.weight_files())
    report.wall_seconds = time.perf_counter() - started
    report.cpu_seconds = time.process_time() - cpu_started
    report.peak_rss_bytes = peak_rss_bytes()
    with writing(writer.folder):
        report.write(writer.folder)


def _tokenizer(model: PathLike) -> Any:
    from .frontend.source import read_tokenizer

    return read_tokenizer(Path(model)) if is_checkpoint(model) else open_model(model).tokenizer


def _load_any(model: PathLike, dtype: torch.dtype | None) -> Any:
    return load(model, dtype=dtype) if is_checkpoint(model) else open_model(model).load_whole(dtype)


def _stored_size(model: PathLike) -> dict[str, Any]:
    """bits_per_weight of the linears inside the blocks, and the size of the weight files."""
    if is_checkpoint(model):
        reader = CheckpointReader(model)
        return {"bits_per_weight": reader.bits_per_weight(), "weights_bytes": reader.weights_bytes()}
    source = open_model(model)
    size = sum(file.stat().st_size for file in source.weight_files())
    return {"bits_per_weight": _source_bits_per_weight(source), "weights_bytes": size}


def _source_bits_per_weight(source: Source) -> float:
    """Average over the matrices inside the blocks of an unquantized model."""
    bits = weights = 0.0
    for block in find_blocks(source.model):
        for name, tensor in tensors_under(source.model, block):
            if tensor.ndim >= 2:
                bits += source.stored_bits(name) * tensor.numel()
                weights += tensor.numel()
    return bits / weights
