"""What the layers of a model may be stored as, by the settings of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch

from ..errors import UsageError
from ..frontend.source import Source
from ..graph.model_graph import Linear
from ..pipeline.run import Run, Specs
from ..spec import FLOAT16, QuantSpec, ScaleDtype, Trellis, spec_of_label
from ..units import plural
from .budget import KEPT_BITS, Rules, format_label
from .candidates import CANDIDATE_BITS
from .grids import Grids, Shape, TargetGrids, TrellisGrids, UniformGrid
from .settings import AUTO, AllocateConfig
from .targets import NVFP4

NEAREST = 4  # formats named in place of one that there is not

Linears = Mapping[str, Linear]
Shapes = Mapping[str, Shape]


class Formats:
    """The grids that settings choose, and the rules and labels that hold there.

    grids: those of the target, or the uniform one. scale_dtype: of scales, where a grid leaves that open. Raises
    UsageError for a single format that is unknown.
    """

    def __init__(self, config: AllocateConfig, scale_dtype: ScaleDtype = FLOAT16):
        self._config, self._scale_dtype, runtime = config, scale_dtype, config.runtime
        own = UniformGrid if config.uses_uniform else TrellisGrids
        self.grids: Grids = own(config, scale_dtype) if runtime is None or not runtime.codes else TargetGrids(runtime)
        one = _single_format(config)
        self._everywhere = None if one is None else self._with_scales(one)

    @classmethod
    def of(cls, config: AllocateConfig, source: Source) -> Formats:
        """Return those for a model: a target that keeps scales in bfloat16 gets no others of a model in it."""
        coarse = config.runtime is not None and config.runtime.keeps_dtype and source.dtype == torch.bfloat16
        return cls(config, "bfloat16" if coarse else FLOAT16)

    def _holds(self, linear: Linear, spec: QuantSpec) -> bool:
        """Return whether the target holds a linear so, where it is a stack of experts."""
        runtime = self._config.runtime
        return runtime is None or linear.kind != "stack" or not runtime.why_no_experts(spec)[0]

    def _with_scales(self, spec: QuantSpec) -> QuantSpec:
        """Return the spec with scales as the target reads them.

        It may multiply layers at once that then share the unit of NVFP4's scales: powers of two fit each other.
        """
        runtime = self._config.runtime
        fits_all = runtime is not None and spec.code in runtime.others
        return spec.with_scales("bfloat16" if fits_all and spec.code == NVFP4 else self._scale_dtype)

    def specs(self, linears: Linears) -> dict[str, QuantSpec | None]:
        """Return what every linear is stored as where nothing chooses; None for rows that no block divides.

        Raises UsageError where the one format allowed divides no rows.
        """
        one, bits = self._everywhere, self._config.bits
        if one is None:
            specs = {name: self.grids.of_width(bits, linear.shape) for name, linear in linears.items()}
            return self._checked(linears, specs | self._of_experts(linears, specs))
        found = {name: one if _divides(one, linear) else None for name, linear in linears.items()}
        if not any(found.values()):
            raise UsageError(
                f"no layer can be stored as {one.label()}, whose blocks of {one.group_size} divide no row of this "
                "model; pass other --formats."
            )
        return self._checked(linears, found)

    def _checked(self, linears: Linears, specs: dict[str, QuantSpec | None]) -> dict[str, QuantSpec | None]:
        """Return the specs; raises UsageError for experts that the target does not hold so."""
        runtime = self._config.runtime
        for name, spec in specs.items():
            if runtime is None or spec is None or linears[name].kind != "stack":
                continue
            why, instead = runtime.why_no_experts(spec)
            if why and not self._config.has_budget:
                raise UsageError(f"{self._config.target} holds no experts {why}; pass {instead}.")
        return specs

    def _of_experts(self, linears: Linears, planned: Specs) -> dict[str, QuantSpec | None]:
        """Return specs with one group size for stacks of experts that the target has in one way."""
        runtime, together = self._config.runtime, dict[str, list[str]]()
        if runtime is None or self._config.group_size is not None or not (runtime.fused or runtime.experts_alike):
            return {}
        for name in (name for name, linear in linears.items() if linear.kind == "stack"):
            together.setdefault("" if runtime.experts_alike else name.rpartition(".")[0], []).append(name)
        found = dict[str, QuantSpec | None]()
        for names in together.values():
            specs = {name: spec for name in names if (spec := planned[name]) is not None}
            size = min(spec.group_size for spec in specs.values())
            found |= {name: replace(spec, group_size=size) for name, spec in specs.items()}
        return found

    def pinned(self, linears: Linears, planned: Specs) -> dict[str, QuantSpec | None]:
        """Return the specs of all linears with those of pins in place of what is planned.

        Raises UsageError for a pattern that fits no linear, and for a format that may not be used.
        """
        rules = self.rules()
        rules.check(linears)
        found = {name: self._pinned(rules, name, linear, planned[name]) for name, linear in linears.items()}
        for name, spec in found.items():
            if spec is not None and not rules.allows(name, spec):
                raise UsageError(
                    f"{name} would be stored as {format_label(spec)}, but only "
                    f"{', '.join(_near(format_label(spec), rules.formats))} may be used; change --bits and "
                    "--group-size, or pass --avg-bits to have formats chosen."
                )
        self._check_alike(found)
        return found

    def _check_alike(self, planned: Specs) -> None:
        """Raise UsageError for groups of several sizes where the target holds one, perhaps with zero points alone."""
        runtime, specs = self._config.runtime, [spec for spec in planned.values() if spec is not None]
        sizes = sorted({spec.group_size for spec in specs})
        if runtime is None or len(sizes) < 2:
            return
        by_zeros = runtime.mixed and not runtime.mixed_with_zeros
        if not runtime.mixed or (by_zeros and not all(spec.symmetric for spec in specs)):
            raise UsageError(
                f"{self._config.target} holds one group size{' with zero points' if by_zeros else ''}, and {sizes[-1]} "
                f"does not divide every width of this model; pass --group-size {sizes[0]}"
                f"{', or --symmetric' if by_zeros else ''}."
            )

    def _pinned(self, rules: Rules, name: str, linear: Linear, planned: QuantSpec | None) -> QuantSpec | None:
        bits = rules.pinned(name)
        if bits is None:
            return planned
        return None if bits == KEPT_BITS else self.grids.of_width(bits, linear.shape)

    def candidates(self, linears: Linears, tables: Shapes, planned: Specs) -> dict[str, list[QuantSpec]]:
        """Return what a budget may choose from for every linear and table; nothing for linears planned to stay floats.

        Raises UsageError for a label that none of them has.
        """
        found: dict[str, list[QuantSpec]] = {}
        for name, linear in linears.items():
            spec = planned[name]
            of_linear = [] if spec is None else self.grids.of_linear(linear, spec)
            found[name] = [self._with_scales(each) for each in of_linear if self._holds(linear, each)]
        found |= {name: self.grids.of_table(shape) for name, shape in tables.items()}
        self._check_labels(spec for specs in found.values() for spec in specs)
        return found

    def uniform(self, linears: Linears, tables: Shapes, planned: Specs) -> dict[int, dict[str, QuantSpec]]:
        """Return, by width, what `--bits` alone gives every linear and table."""
        specs = {name: spec for name in linears if (spec := planned[name]) is not None}
        shapes = {name: linears[name].shape for name in specs} | dict(tables)

        def of(bits: int) -> dict[str, QuantSpec]:
            found = {name: self.grids.with_bits(bits, specs.get(name), shape) for name, shape in shapes.items()}
            return {name: spec for name, spec in found.items() if spec is not None}

        return {bits: of(bits) for bits in CANDIDATE_BITS}

    def instead(self, linears: Linears, planned: Specs) -> dict[str, QuantSpec]:
        """Return what linears planned in trellis codes have on the uniform grid, where settings leave the choice."""
        if self._config.code != AUTO or not isinstance(self.grids, TrellisGrids):
            return {}
        trellis = {name: spec for name in linears if (spec := planned[name]) and spec.code == Trellis.name}
        return {name: self.grids.instead(spec, linears[name].shape) for name, spec in trellis.items()}

    def rules(self) -> Rules:
        """Return what a plan must hold to; raises UsageError for a format that the target does not load."""
        config, runtime, labels = self._config, self._config.runtime, self._config.labels
        if runtime is None:
            return Rules(config.pins, labels)
        loaded = (*runtime.formats(config.symmetric), *runtime.others)
        refused = [label for label in labels if label not in loaded]
        if refused:
            raise UsageError(
                f"{config.target} does not load {refused[0]}; it loads {', '.join(_near(refused[0], loaded))}; "
                f"`quantc targets {config.target}` lists all."
            )
        return Rules(config.pins, labels or runtime.formats(config.symmetric), runtime.fused, runtime.experts_alike)

    @property
    def cover_head(self) -> bool:
        """Whether an embedding or a head may have them too; of targets that is known of their own grids alone."""
        runtime = self._config.runtime
        return not self._config.formats and (runtime is None or bool(runtime.codes))

    def notes(self, run: Run) -> list[str]:
        """Return what the widths of a model change in a plan without a budget."""
        one = self._everywhere
        if one is None:
            return self.grids.notes(run)
        uneven = sum(not _divides(one, linear) for linear in run.graph.linears.values())
        short = f"whose rows blocks of {one.group_size} do not divide"
        return [f"{plural(uneven, 'layer')} kept as floats, {short}"] if uneven else []

    def _check_labels(self, specs: Iterable[QuantSpec]) -> None:
        known = dict.fromkeys(map(format_label, specs))
        unknown = [label for label in self._config.labels if label not in known]
        if unknown:
            near = get_close_matches(unknown[0], known, n=NEAREST, cutoff=0.0)
            raise UsageError(
                f"no layer can be stored as {unknown[0]}; choose from the {len(known)} formats that --group-size, "
                f"--symmetric and --sparsity allow, such as {', '.join(near)}."
            )


def _single_format(config: AllocateConfig) -> QuantSpec | None:
    """Return the one format allowed, which every layer then has; None with a budget, or bits that contradict it."""
    if config.has_budget or len(config.formats) != 1:
        return None
    spec = spec_of_label(config.formats[0])
    if spec is None:
        raise UsageError(
            f"no layer can be stored as {config.formats[0]}; pass --formats w4g128, nf4-g64, mxfp4 or another."
        )
    fits = config.group_size in (None, spec.group_size) and config.symmetric <= spec.symmetric
    return spec if spec.bits == config.bits and fits else None


def _divides(spec: QuantSpec, linear: Linear) -> bool:
    return spec.grid.divides(linear.shape[1])


def _near(label: str, labels: Sequence[str]) -> Sequence[str]:
    """Return those of many formats that have the width of a label, or all where none has."""
    width = label.partition("g")[0]
    return [each for each in labels if each.partition("g")[0] == width] or labels
