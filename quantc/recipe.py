"""The recipe: calibration and passes, as a frozen, closed configuration that YAML reads and writes.

Unknown keys are refused with the nearest known one: a typo must not run for an hour and do something else.
"""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from . import passes  # noqa: F401  registers every pass
from .calibration.tokens import LARGEST, CalibrationConfig
from .errors import UsageError
from .files.untrusted import describe, fits, nearest, read_yaml
from .pipeline.base import REGISTRY, Pass

VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """calibration: the data. passes: (name, config) in the order they run."""

    calibration: CalibrationConfig
    passes: tuple[tuple[str, Any], ...]

    def build_passes(self) -> list[Pass]:
        return [REGISTRY[name](config) for name, config in self.passes]

    def with_settings(self, **settings: Any) -> Recipe:
        """Return this recipe with `part={key: value}` settings replaced; None values are left alone."""
        known = {"calibration", *(name for name, _ in self.passes)}
        for part, values in settings.items():
            if part not in known and any(value is not None for value in values.values()):
                raise UsageError(
                    f"the recipe has no pass {part}, so its settings cannot be given; add it to the recipe."
                )
        return Recipe(
            _replaced(self.calibration, settings.get("calibration", {})),
            tuple((name, _replaced(config, settings.get(name, {}))) for name, config in self.passes),
        )

    def including(self, name: str, before: str | None = None) -> Recipe:
        """Return this recipe with a pass added at its defaults, before another or last, unless it has that pass."""
        if any(known == name for known, _ in self.passes):
            return self
        place = next((at for at, (known, _) in enumerate(self.passes) if known == before), len(self.passes))
        added = (name, REGISTRY[name].Config())
        return replace(self, passes=(*self.passes[:place], added, *self.passes[place:]))

    def without(self, part: str, *keys: str) -> Recipe:
        """Return this recipe with settings of a pass at their defaults."""
        return replace(
            self,
            passes=tuple(
                (
                    name,
                    replace(config, **{key: getattr(type(config)(), key) for key in keys}) if name == part else config,
                )
                for name, config in self.passes
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "calibration": asdict(self.calibration),
            "passes": [{name: asdict(config)} for name, config in self.passes],
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, content: Any) -> Recipe:
        """Undo to_dict; keys left out have their defaults. Raises UsageError for anything unknown."""
        mapping = _mapping(content, "the recipe")
        _refuse_unknown(mapping, ["version", "calibration", "passes"], "the recipe")
        if not fits(mapping.get("version"), typing.Literal[1]):
            raise UsageError(f"the recipe has version {mapping.get('version')!r}, but `version: {VERSION}` is needed.")
        entries = mapping.get("passes", [])
        if not isinstance(entries, list) or not entries:
            raise UsageError("the recipe has no list `passes`; write one with at least allocate and quantize.")
        return cls(
            from_mapping(CalibrationConfig, mapping.get("calibration", {}), "calibration"),
            tuple(_read_pass(entry) for entry in entries),
        )


def read_recipe(file: Path) -> Recipe:
    """Return the recipe in a YAML file; raises UsageError that says what is wrong with it."""
    try:
        content = read_yaml(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"the recipe {file} cannot be read ({error}); a YAML file is needed.") from error
    return Recipe.from_dict(content)


def without_text(wanted: list[Pass]) -> tuple[list[Pass], list[str]]:
    """Return the passes of a run without calibration text, and notes on those left out or doing something else."""
    pairs = [(item, item.uncalibrated()) for item in wanted]
    notes = [_describe_change(item, other) for item, other in pairs if item is not other]
    return [other for _, other in pairs if other is not None], notes


def from_mapping(kind: type, content: Any, where: str) -> Any:
    """Return a frozen dataclass made from a mapping: unknown keys and wrong types are UsageErrors."""
    mapping = _mapping(content, where)
    assert is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    _refuse_unknown(mapping, [field.name for field in fields(kind)], where)
    for key, value in mapping.items():
        if not fits(value, hints[key]):
            raise UsageError(f"{where}: {key} is {value!r}, but {describe(hints[key])} is needed.")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(f"{where}: {key} is {value}, but {LARGEST} at most is possible; lower it.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()})


def _read_pass(entry: Any) -> tuple[str, Any]:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(f"the pass entry {entry!r} is not `name: settings`; write one pass per list item.")
    ((name, settings),) = entry.items()
    _refuse_unknown({name: settings}, list(REGISTRY), "passes")
    return name, from_mapping(REGISTRY[name].Config, {} if settings is None else settings, f"pass {name}")


def _describe_change(item: Pass, other: Pass | None) -> str:
    if other is None:
        return f"{item.name} was left out: it needs calibration text"
    before, after = asdict(item.config), asdict(other.config)
    changes = [f"{key} {after[key]} instead of {before[key]}" for key in after if after[key] != before[key]]
    return f"without calibration text {item.name} has {', '.join(changes)}"


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UsageError(f"{where} is {content!r}; a mapping of keys to values is needed.")
    return content


def _refuse_unknown(mapping: dict[str, Any], known: list[str], where: str) -> None:
    for key in mapping:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else "it has no keys at all."
            raise UsageError(f"{where} has the unknown key {key!r}; {hint}")


def _replaced(config: Any, settings: dict[str, Any]) -> Any:
    given = {key: value for key, value in settings.items() if value is not None}
    return replace(config, **given) if given else config


def _recipe(*names: str, **settings: dict[str, float]) -> Recipe:
    recipe = Recipe(CalibrationConfig(), tuple((name, REGISTRY[name].Config()) for name in names))
    return recipe.with_settings(**settings)


# fast: error feedback, and nothing to compute beside the weights at inference. balanced: inputs are rotated where that
# pays, at the cost of a Hadamard transform for each activation. best: the same cost at inference, and about ten times
# the CPU seconds to quantize, most of them to train. `importance` is in none: twice the time for no sure gain.
PRESETS: dict[str, Recipe] = {
    "fast": _recipe("allocate", "quantize"),
    "balanced": _recipe("allocate", "rotate", "quantize", quantize={"shrink": 0.3}),
    "best": _recipe(
        *("allocate", "scale", "rotate", "quantize", "tune", "distill"),
        quantize={"shrink": 0.3, "rounds": 2, "correct": 0.5},
        tune={"steps": 20},
    ),
}
DEFAULT = PRESETS["balanced"]


def preset(name: str) -> Recipe:
    """Return the recipe of this name; raises UsageError with the nearest known name."""
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise UsageError(
            f"--preset {name!r} is unknown; choose one of {', '.join(PRESETS)} (did you mean {near[0]!r}?)."
        )
    return PRESETS[name]
