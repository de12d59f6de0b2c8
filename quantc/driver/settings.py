"""Settings of a run: what users may choose, and the recipe and passes that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from ..calibration.tokens import NO_TEXT
from ..errors import UsageError, as_option
from ..frontend.source import PathLike
from ..passes.allocate import Allocate
from ..passes.rotate import Rotate
from ..passes.sparsify import Sparsify
from ..passes.tune import Tune
from ..pipeline.base import Pass
from ..plan import Plan, read_plan
from ..planning.settings import AUTO, GRID, AllocateConfig
from ..recipe import DEFAULT, Recipe, read_recipe, without_text
from ..recipe import preset as named_preset
from ..spec import MOST_TRELLIS_BITS, QuantSpec, spec_of_label, trellis_spec
from ..units import parse_duration, parse_size, size

BUDGETS = ("avg_bits", "size")  # of allocate
ANY_SIZE = 1 << 60  # bytes
# SmolLM2-135M in groups of 64: a KL divergence of 0.348 without the pass and 0.270 with it (docs/results.md).
ROTATION_GAIN = "a checkpoint of quantc's own with it loses about a fifth less at 3 bits"


class Settings(TypedDict, total=False):
    """What a run may be told besides the model and where to write; the command line's options of the same names.

    preset: fast, balanced (the default) or best. recipe: a Recipe or a YAML file instead; the other settings override
    either.
    bits: of every code; with a fraction it means avg_bits: what a weight inside the blocks takes on average, all that
    is stored counted. size: instead, bytes of the weight files, or text such as 300MiB. Within either budget, layers
    get mixed precision by predicted loss, under these rules. pins: pattern of names -> bits. formats: the labels
    allowed, such as w4g128 or mxfp4; a single one without a budget is that of every layer. target: a runtime that has
    to load the result. search: generations that then refine the plan by measuring.
    code: what codes of linears stand for: evenly spaced values (grid), trellis codes, or whichever loses less (auto).
    sparsity: share of the groups of every linear that are dropped, or "2:4"; group_size then is theirs. auto, with a
    budget: groups may be dropped from any linear.
    tune_steps: training steps for each block after rounding. tune_budget: wall seconds for all of them, or text such as
    10min; either adds the pass tune to a recipe without it.
    method: gptq or rtn. calib: builtin, self, a file or a data set; none rounds without calibration text.
    trust_remote_code: run Python code that the model's folder or repository brings.
    """

    preset: str | None
    recipe: Recipe | PathLike | None
    bits: float | None
    avg_bits: float | None
    size: int | str | None
    code: Literal["grid", "trellis", "auto"] | None
    group_size: int | None
    symmetric: bool | None
    sparsity: float | Literal["2:4", "auto"] | None
    tune_steps: int | None
    tune_budget: float | str | None
    head_bits: int | Literal["auto", "keep"] | None
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


def chosen_recipe(settings: Settings) -> Recipe:
    """Return the recipe that settings name, with what else they say; raises UsageError for a setting there is not."""
    unknown = sorted(set(settings) - set(Settings.__annotations__))
    if unknown:
        raise UsageError(f"there is no setting {unknown[0]!r}; there are {', '.join(Settings.__annotations__)}.")
    allocate = _allocation(settings)
    if all(allocate[name] is None for name in ("bits", *BUDGETS)):
        allocate["bits"] = _bits_of_format(settings.get("formats"))
    kept = {key: settings.get(key) for key in ("samples", "seq_len", "seed")}
    recipe = named_recipe(settings)
    if any(settings.get(name) is not None for name in ("bits", *BUDGETS)):  # what the recipe says is overridden
        recipe = recipe.without("allocate", *BUDGETS)
    return _trained(_sparsified(recipe, settings), settings).with_settings(
        allocate=allocate,
        quantize={"method": settings.get("method")},
        calibration={"source": settings.get("calib"), **kept},
    )


def _allocation(settings: Settings) -> dict[str, Any]:
    """Return the settings of allocate; None leaves what the recipe says."""
    limit, formats, bits = settings.get("size"), settings.get("formats"), settings.get("bits")
    for name in BUDGETS:
        if bits is not None and settings.get(name) is not None:
            raise UsageError(
                f"--bits is {bits:g} and {as_option(name)} is {settings.get(name)}, but one of them decides; remove "
                "the other."
            )
    names = ("code", "group_size", "symmetric", "head_bits", "pins", "target", "search")
    kept = {key: settings.get(key) for key in names}
    kept["sparsity"] = AUTO if settings.get("sparsity") == AUTO else None
    return {
        **_widths(bits, settings.get("avg_bits")),
        **kept,
        "size": None if limit is None else as_bytes(limit),
        "formats": None if formats is None else tuple(formats),
    }


def _bits_of_format(formats: Sequence[str] | None) -> int | None:
    """Return the width of the one format allowed, if it is one: every layer then has it."""
    spec = spec_of_label(formats[0]) if formats is not None and len(formats) == 1 else None
    return None if spec is None else spec.bits


def as_bytes(limit: int | str) -> int:
    """Return bytes from a number of them or from text such as 300MiB."""
    return parse_size(limit) if isinstance(limit, str) else limit


def _widths(bits: float | None, avg_bits: float | None) -> dict[str, Any]:
    """Return allocate's bits and avg_bits; bits with a fraction are an average."""
    if bits is None or bits == int(bits):
        return {"bits": None if bits is None else int(bits), "avg_bits": avg_bits}
    return {"bits": None, "avg_bits": bits}


def named_recipe(settings: Settings) -> Recipe:
    """Return the recipe or preset that settings name, as it is."""
    recipe, preset = settings.get("recipe"), settings.get("preset")
    if preset is not None:
        if recipe is not None:
            raise UsageError("--preset is a recipe of its own; remove --preset or --recipe.")
        return named_preset(preset)
    if isinstance(recipe, Recipe):
        return recipe
    return DEFAULT if recipe is None else read_recipe(Path(recipe))


def with_target(settings: Settings, target: str, sized: bool) -> Settings:
    """Return the settings with a target in their recipe, which also a given plan keeps to.

    sized: whether something limits the size of the output, embedding and head included: then their types are chosen
    too, unless something says how they are stored. Raises UsageError where another target is named.
    """
    recipe = named_recipe(settings)
    config = next((config for name, config in recipe.passes if name == Allocate.name), None)
    found = settings.get("target") or (config and config.target)
    if found not in (None, target):
        raise UsageError(f"--target is {found}, but the output is a file for {target}; remove --target.")
    if config is not None:
        free = sized and config.head_bits is None and config.estimator == "fisher"
        free &= not (settings.get("search") or config.search)
        recipe = recipe.with_settings(allocate={"target": target, "head_bits": AUTO if free else None})
    return {**settings, "recipe": recipe, "preset": None, "target": None}


def _sparsified(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with sparsify where a sparsity is asked for; a group size is that of the groups dropped."""
    sparsity = settings.get("sparsity")
    if sparsity == AUTO:  # is for allocate
        return recipe
    if sparsity is not None:
        recipe = recipe.including(Sparsify.name, before="quantize")
    if all(name != Sparsify.name for name, _ in recipe.passes):
        return recipe
    return recipe.with_settings(sparsify={"sparsity": sparsity, "group_size": settings.get("group_size")})


def _trained(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with the pass tune where steps or a budget for it are asked for."""
    steps, budget = settings.get("tune_steps"), settings.get("tune_budget")
    if steps is None and budget is None:
        return recipe
    seconds = parse_duration(budget) if isinstance(budget, str) else budget
    return recipe.including(Tune.name).with_settings(tune={"steps": steps, "budget": seconds})


def running_passes(recipe: Recipe, method: str | None) -> tuple[list[Pass], list[str]]:
    """Return the passes that run, and notes on those that do not, or not as the recipe says."""
    passes, notes = _without_rotation(recipe.build_passes())
    if recipe.calibration.source != NO_TEXT:
        return passes, notes
    if method == "gptq":
        raise UsageError("--method gptq needs calibration text, and --calib is none; remove --method, or pass a text.")
    passes, more = without_text(passes)
    return passes, notes + more


def _without_rotation(passes: list[Pass]) -> tuple[list[Pass], list[str]]:
    """Return the passes that a target can hold, and a note where rotate is not among them."""
    config = allocation(passes)
    runtime = None if config is None else config.runtime
    kept = [item for item in passes if item.name != Rotate.name]
    if config is None or runtime is None or runtime.rotations or len(kept) == len(passes):
        return passes, []
    return kept, [f"rotate was left out: {config.target} cannot rotate inputs; {ROTATION_GAIN}"]


def check_combination(passes: list[Pass]) -> None:
    """Raise UsageError where passes ask for what cannot be had together, or what a target does not load."""
    config = allocation(passes)
    target = config and config.target
    sparse = any(isinstance(item, Sparsify) for item in passes)
    automatic = config is not None and config.sparsity == AUTO
    if config is not None and sparse and (config.has_budget or automatic):
        raise UsageError(
            "a budget chooses layer by layer, and the pass sparsify drops weights of every layer alike; pass --bits "
            "instead of the budget, or --sparsity auto instead of the pass."
        )
    if config is not None and sparse and config.code != GRID:
        raise UsageError(f"--sparsity drops weights of grids, and --code is {config.code}; remove one of the two.")
    folded = any(isinstance(item, Rotate) and item.config.residual == "folded" for item in passes)
    if target is not None and folded:
        raise UsageError(
            f"{target} cannot load a model whose residual stream is rotated; take residual: folded out of the recipe."
        )
    if target is not None and (sparse or automatic):
        raise UsageError(f"{target} cannot load layers with dropped weights; remove --sparsity.")


def given_plan(plan: PathLike | None, settings: Settings) -> Plan:
    """Return the plan of a file, or an empty one; raises UsageError where settings say how linears are stored too."""
    if plan is None:
        return Plan()
    says = {**_allocation(settings), "sparsity": settings.get("sparsity")}
    given = [name for name, value in says.items() if value is not None]
    if given:
        raise UsageError(
            f"--plan says how every layer is stored; remove {' and '.join(map(as_option, given))}, or edit the plan."
        )
    return read_plan(Path(plan))


def allocation(passes: list[Pass]) -> AllocateConfig | None:
    """Return the settings of allocate; None in a recipe without it, whose plan is given."""
    return next((item.config for item in passes if isinstance(item, Allocate)), None)


def default_name(model: str, passes: list[Pass], plan: Plan) -> str:
    """Return `<model>-quantc-w4g128`, or `-plan` where a plan was given."""
    allocate = allocation(passes)
    if plan.specs or allocate is None:
        return f"{model}-quantc-plan"
    group = 128 if allocate.group_size is None else allocate.group_size
    if allocate.avg_bits is not None:
        return f"{model}-quantc-{allocate.avg_bits:g}bits"
    if allocate.size is not None:
        return f"{model}-quantc-{size(allocate.size).replace(' ', '')}"
    if len(allocate.formats) == 1:
        return f"{model}-quantc-{allocate.formats[0]}"
    if not allocate.uses_uniform and allocate.bits <= MOST_TRELLIS_BITS:
        return f"{model}-quantc-{trellis_spec(allocate.bits).label()}"
    spec = QuantSpec(allocate.bits, group, allocate.grouping, allocate.symmetric)
    for item in passes:
        spec = item.config.sparse(spec) if isinstance(item, Sparsify) else spec
    return f"{model}-quantc-{spec.label()}"
