"""What users call: quantize(), plan(), pareto(), load(), evaluate(), compare(), check(), export()."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from .driver.curve import draw_curve
from .driver.job import Job
from .driver.quality import Target
from .driver.quantize import build_as_asked, build_to_quality, plan_alone, refuse_budget
from .driver.settings import Settings
from .errors import UsageError
from .evaluation.compare import Comparison, compare_models
from .evaluation.evaluate import Asked
from .evaluation.evaluate import evaluate as measure
from .evaluation.gate import Limits, Verdict, check_model
from .evaluation.scores import Evaluation
from .evaluation.side_by_side import Reading
from .export.gguf.from_model import Wanted, is_gguf, quantize_to_file
from .frontend.source import PathLike
from .pages import compare_page
from .pipeline.run import Run
from .planning.pareto import Curve
from .progress import LogProgress, Progress
from .report import Report
from .runtime.load import load

if TYPE_CHECKING:
    from .export.folders.job import ExportedFolder
    from .export.gguf.job import Exported

__all__ = ["check", "compare", "evaluate", "export", "load", "pareto", "plan", "quantize"]


def quantize(
    model: PathLike,
    *,
    out: PathLike | None = None,
    plan: PathLike | None = None,
    device: str = "cpu",
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    max_kl: float | None = None,
    max_ppl_increase: float | None = None,
    text: str | None = None,
    like: str | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Quantize a model into a packed checkpoint and return the report.

    model: folder, .gguf file, hub id or demo name. out: output folder, `<model>-quantc-w4g128` or so by default; a name
    that ends in .gguf gives a file for llama.cpp, quantized on its own grids, whose size is that of `size`.
    plan: a plan.yaml whose specs are used as they are. max_kl, max_ppl_increase: instead of bits, what the smallest
    model that is made may lose, in nats per token, or as a share of the perplexity, 0.02 for 2 %; measured on `text`,
    or on a held-out eighth of the calibration windows. like: instead of bits, a mix of llama.cpp's quantizer, such as
    Q4_K_M: a GGUF file of at most the size that it would have. settings: see Settings. Raises a QuantcError whose
    message is one sentence.

    A run that is interrupted, or fails after its first block, leaves `<out>.unfinished`. resume: continue it, with the
    same settings on the same kind of machine, to the same bytes; where there is none this one starts. force: replace
    the output, and without resume what an interrupted run has left.
    """
    target = None if max_kl is None and max_ppl_increase is None else Target(max_kl, max_ppl_increase)
    if target is not None:
        refuse_budget(target, plan, settings)
    elif text is not None:
        raise UsageError(
            "--text is for measuring a quality target, and there is none; pass --max-kl or --max-ppl-increase too."
        )
    if is_gguf(out) or like is not None:
        wanted = Wanted(target, text, like)
        return quantize_to_file(model, out, plan, wanted, device, force, resume, progress, settings)
    job = Job.of(settings, plan, device, progress)
    if target is None:
        return build_as_asked(job, model, out, settings.get("size"), force, resume)
    job = Job.of_any_size(settings, device, progress)
    return build_to_quality(target, job, model, out, text, force, resume)


def plan(
    model: PathLike,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Run:
    """Return the run as far as its plan, which says how a model would be stored within a budget; nothing is rounded.

    settings: as in `quantize`, which takes the plan (`result.plan.to_yaml()`) back.
    """
    return plan_alone(model, device, progress, settings)


def pareto(
    model: PathLike,
    *,
    out: PathLike = ".",
    verify: int = 0,
    text: str | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Curve:
    """Return predicted KL divergence against size: about 16 plans from one measurement, and uniform widths to compare.

    out: folder for pareto.html and, where matplotlib is installed, pareto.png; force replaces these files. verify:
    the number of points to build in `out`, one after the other, and to measure on `text`; each build is removed again.
    settings: as in `quantize`, but no budget. Raises a QuantcError whose message is one sentence.
    """
    return draw_curve(model, Path(out), verify, text, device, force, progress, settings)


def evaluate(
    model: PathLike,
    *,
    text: str | None = None,
    against: PathLike | None = None,
    context: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Return the perplexity of a model or checkpoint on a text, its divergence from the original `against`, and what it
    scores on tasks; one of text and tasks is enough.

    text: a file or the name of a data set. context: tokens per window, 512 or the model's own limit if that is less.
    tasks: names of lm-eval's tasks, paths of task files in its format, or of folders of those, also with commas in one
    text; needs the package lm-eval. limit: how many questions of each are asked, the first ones, all by default.
    few_shot: solved examples in front of each question, as many as the task says by default.
    dtype: float32, bfloat16 or float16; None is the models' own, or float32 where the CPU has no products of it.
    trust_remote_code: run code that a model brings.
    A GGUF file is measured by llama.cpp where xllamacpp is installed and neither a dtype nor a device is named; the
    result's dtype_reason says so. See evaluation/scores.py for the protocol.
    """
    names = tasks.split(",") if isinstance(tasks, str) else tuple(tasks or ())
    asked = Asked(text, context, stride, windows, names, limit, few_shot)
    return measure(model, asked, against, dtype, device, progress or LogProgress(), trust_remote_code)


def compare(
    *models: PathLike,
    text: str,
    blocks: bool = False,
    page: PathLike | None = None,
    context: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Return size, perplexity, divergence from the first model, and decode speed of two or more models.

    models: checkpoints, and whatever `quantize` takes; all must have one vocabulary. blocks: also measure the output of
    every decoder block against the first model's. page: an HTML file to write; one that quantc wrote is replaced.
    All predictions are computed in one dtype, a GGUF file's from its dequantized weights; its decode speed is that of
    llama.cpp where xllamacpp is installed. The other settings are those of `evaluate`. Two models are in memory at a
    time.
    Raises a QuantcError whose message is one sentence.
    """
    file = None if page is None else compare_page.check(page)
    reading = Reading(text, context, stride, windows, dtype, device, trust_remote_code)
    result = compare_models(models, reading, blocks, progress or LogProgress())
    if file is not None:
        compare_page.write(result, file)
    return result


def check(
    model: PathLike,
    *,
    against: PathLike,
    text: str,
    max_kl: float | None = None,
    max_ppl_increase: float | None = None,
    context: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> Verdict:
    """Return whether a model is as near to the original `against` as the limits say, and where not, what hurts most.

    max_kl: the largest KL divergence, in nats per token. max_ppl_increase: the largest increase of the perplexity, 0.02
    for 2 %. At least one is needed. Where one is exceeded, the original's weights are put back into parts of the model,
    in memory: the result's `blame` names the blocks, and the linears in them, that lose most. The other settings are
    those of `evaluate`. Raises a QuantcError whose message is one sentence.
    """
    limits = Limits(max_kl, max_ppl_increase)
    reading = Reading(text, context, stride, windows, dtype, device, trust_remote_code)
    return check_model(model, against, limits, reading, progress or LogProgress())


def export(
    checkpoint: PathLike,
    *,
    to: str = "gguf",
    out: PathLike | None = None,
    force: bool = False,
    tokenizer: bool = True,
    pre_tokenizer: str | None = None,
    metadata: PathLike | None = None,
    progress: Progress | None = None,
) -> Exported | ExportedFolder:
    """Write the weights of a checkpoint, exactly as they are, into another container and return what was written.

    to: gguf, a file that llama.cpp runs, or vllm, compressed-tensors, gptq, awq, auto-round or mlx, a folder that these
    load. out: the file or folder, `<checkpoint>.gguf` or `<checkpoint>-<to>` by default; force replaces one that quantc
    wrote. Of GGUF alone: tokenizer, whether the file has one (without, it takes token ids alone); pre_tokenizer,
    llama.cpp's name for how the tokenizer cuts texts into words, where quantc cannot tell; metadata, a GGUF file whose
    metadata is kept, by default the one that the checkpoint was made from: any architecture then works. What the
    container cannot hold is refused by name before any work. What was written is read back, also by the runtime where
    it is installed and reads it here, before it has its name. Raises a QuantcError whose message is one sentence.
    """
    folder, shown = Path(checkpoint), progress or LogProgress()
    named = folder if folder.name not in ("", "..") else folder.resolve()
    if to != "gguf":
        from .export.folders.job import export_folder

        own = {"--no-tokenizer": not tokenizer, "--pre-tokenizer": pre_tokenizer, "--metadata": metadata}
        if given := [option for option, value in own.items() if value]:
            raise UsageError(f"{given[0]} is of GGUF files, and --to is {to}; remove it.")
        return export_folder(folder, to, Path(out or named.parent / f"{named.name}-{to}"), force, shown)
    from .export.gguf.job import export_gguf

    file = Path(out) if out is not None else named.parent / f"{named.name}.gguf"
    kept = None if metadata is None else Path(metadata)
    return export_gguf(folder, file, force, tokenizer, pre_tokenizer, kept, shown)
