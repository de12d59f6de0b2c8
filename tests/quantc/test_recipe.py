"""The recipe: closed, frozen, and the same after a trip through YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantc.calibration.tokens import CalibrationConfig
from quantc.errors import UsageError
from quantc.pipeline.base import REGISTRY
from quantc.recipe import DEFAULT, Recipe, from_mapping, preset, read_recipe

PASSES = ["allocate", "quantize"]


def write(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def test_default_survives_yaml(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, DEFAULT.to_yaml())) == DEFAULT
    assert Recipe.from_dict(DEFAULT.to_dict()) == DEFAULT


def test_settings_survive_yaml(tmp_path: Path) -> None:
    recipe = DEFAULT.with_settings(
        allocate={"bits": 3, "group_size": -1, "symmetric": True, "head_bits": 8},
        quantize={"method": "rtn", "damp": 0.5},
        calibration={"source": "text.txt", "samples": 3, "seq_len": 40, "seed": 9},
    )
    again = read_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again != DEFAULT
    configs = dict(again.passes)
    assert (configs["allocate"].bits, configs["allocate"].group_size, configs["quantize"].damp) == (3, -1, 0.5)
    assert again.calibration == CalibrationConfig("text.txt", 3, 40, 9)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    short = read_recipe(write(tmp_path, {"version": 1, "passes": ["allocate", {"quantize": None}]}))
    assert short == preset("fast")


def test_the_order_of_the_passes_is_kept() -> None:
    recipe = Recipe.from_dict({"version": 1, "passes": ["quantize", {"allocate": {"bits": 2}}]})
    assert [name for name, _ in recipe.passes] == ["quantize", "allocate"]
    assert [item.name for item in recipe.build_passes()] == ["quantize", "allocate"]


def test_none_leaves_a_setting_alone() -> None:
    assert DEFAULT.with_settings(allocate={"bits": None}, calibration={"seed": None}) == DEFAULT
    only_quantize = Recipe.from_dict({"version": 1, "passes": ["quantize"]})
    assert only_quantize.with_settings(allocate={"bits": None}) == only_quantize


def test_settings_of_a_pass_the_recipe_lacks_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict({"version": 1, "passes": ["quantize"]}).with_settings(allocate={"bits": 3})
    assert str(caught.value) == (
        "the recipe has no pass allocate, so its settings cannot be given; add it to the recipe."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"version": 1, "passes": PASSES, "calibation": {}}, "unknown key 'calibation'; did you mean 'calibration'?"),
        ({"version": 2, "passes": PASSES}, "the recipe has version 2, but `version: 1` is needed."),
        ({"passes": PASSES}, "the recipe has version None, but `version: 1` is needed."),
        ({"version": 1}, "the recipe has no list `passes`; write one with at least allocate and quantize."),
        ({"version": 1, "passes": []}, "the recipe has no list `passes`"),
        ({"version": 1, "passes": "quantize"}, "the recipe has no list `passes`"),
        ({"version": 1, "passes": ["quantise"]}, "passes has the unknown key 'quantise'; did you mean 'quantize'?"),
        (
            {"version": 1, "passes": [{"allocate": {}, "quantize": {}}]},
            "is not `name: settings`; write one pass per list item.",
        ),
        ({"version": 1, "passes": [3]}, "the pass entry 3 is not `name: settings`"),
        ({"version": 1, "passes": [{"allocate": 4}]}, "pass allocate is 4; a mapping of keys to values is needed."),
        (
            {"version": 1, "passes": [{"allocate": {"bit": 4}}]},
            "pass allocate has the unknown key 'bit'; did you mean 'bits'?",
        ),
        (
            {"version": 1, "passes": [{"quantize": {"dampp": 1}}]},
            "pass quantize has the unknown key 'dampp'; did you mean 'damp'?",
        ),
        (
            {"version": 1, "passes": [{"allocate": {"bits": "4"}}]},
            "pass allocate: bits is '4', but a whole number is",
        ),
        ({"version": 1, "passes": [{"allocate": {"bits": True}}]}, "bits is True, but a whole number is needed."),
        ({"version": 1, "passes": [{"allocate": {"bits": 4.5}}]}, "bits is 4.5, but a whole number is needed."),
        (
            {"version": 1, "passes": [{"allocate": {"group_size": "big"}}]},
            "group_size is 'big', but a whole number or null is needed.",
        ),
        (
            {"version": 1, "passes": [{"allocate": {"grouping": "rows"}}]},
            "grouping is 'rows', but 'per_oc' or 'per_ic' is needed.",
        ),
        (
            {"version": 1, "passes": [{"allocate": {"symmetric": "yes"}}]},
            "symmetric is 'yes', but true or false is",
        ),
        ({"version": 1, "passes": [{"allocate": {"bits": 9}}]}, "bits is 9, but codes have 2 to 8 bits"),
        ({"version": 1, "passes": [{"allocate": {"head_bits": 1}}]}, "bits is 1, but codes have 2 to 8 bits"),
        (
            {"version": 1, "passes": [{"quantize": {"method": "awq"}}]},
            "method is 'awq', but 'gptq' or 'rtn' is needed.",
        ),
        ({"version": 1, "passes": [{"quantize": {"damp": 0}}]}, "damp is 0, but damping needs a positive share"),
        ({"version": 1, "passes": [{"quantize": {"damp": None}}]}, "damp is None, but a finite number is needed."),
        ({"version": 1, "passes": PASSES, "calibration": {"sample": 3}}, "did you mean 'samples'?"),
        ({"version": 1, "passes": PASSES, "calibration": {"samples": 0}}, "samples is 0, but at least 1 is needed"),
        ({"version": 1, "passes": PASSES, "calibration": {"seq_len": 7}}, "seq_len is 7, but at least 8 is needed"),
        ({"version": 1, "passes": PASSES, "calibration": {"seed": -1}}, "seed is -1, but at least 0 is needed"),
        ({"version": 1, "passes": PASSES, "calibration": {"source": 3}}, "source is 3, but a text is needed."),
        ("- a\n- b\n", "the recipe is ['a', 'b']; a mapping of keys to values is needed."),
        ("", "the recipe is None; a mapping of keys to values is needed."),
        ("a: [", "cannot be read (while parsing"),
        ({"version": True, "passes": PASSES}, "the recipe has version True, but `version: 1` is needed."),
        ({"version": 1, "passes": [{"allocate": False}]}, "pass allocate is False; a mapping"),
        ({"version": 1, "passes": [{3: {}}]}, "passes has the unknown key 3"),
        (
            {"version": 1, "passes": [{"quantize": {"damp": float("nan")}}]},
            "damp is nan, but a finite number is",
        ),
        (
            {"version": 1, "passes": [{"quantize": {"damp": float("inf")}}]},
            "damp is inf, but a finite number is",
        ),
        ({"version": 1, "passes": [{"quantize": {"rounds": 2**64}}]}, "but 9223372036854775807 at most is possible"),
        (
            {"version": 1, "passes": [{"allocate": {"pins": {1: 4}}}]},
            "but a mapping of a text to a whole number",
        ),
        ({"version": 1, "passes": PASSES, "calibration": {"samples": 10**7}}, "but 1000000 at most are possible"),
        ({"version": 1, "passes": PASSES, "calibration": {"seq_len": 10**7}}, "but 1048576 at most are possible"),
        (
            {"version": 1, "passes": PASSES, "calibration": {"seed": 2**63}},
            "calibration: seed is 9223372036854775808, but 9223372036854775807 at most is possible",
        ),
        ({"version": 1, "passes": [{"q" * 10**6: {}}]}, "passes has the unknown key 'qqq"),
        ("a: " + "[" * 500 + "]" * 500, "lists or mappings inside each other"),
        (f"version: {'9' * 5000}", "cannot be read (Exceeds the limit"),
        ("a: &a [*a]", "an alias is inside what it names"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the recipe .*nowhere\.yaml cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("kind", [CalibrationConfig, *(item.Config for item in REGISTRY.values())])
def test_configurations_are_frozen_documented_and_closed(kind: type) -> None:
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, next((field.name for field in dataclasses.fields(config)), "new"), None)
    assert kind.__doc__
    assert not kind.__doc__.startswith(kind.__name__ + "(")  # what dataclass writes by itself
    assert from_mapping(kind, dataclasses.asdict(config), "here") == config
    with pytest.raises(UsageError, match="here has the unknown key 'newx'"):
        from_mapping(kind, {"newx": 1}, "here")
    for field in dataclasses.fields(config)[:1]:
        with pytest.raises(UsageError, match=f"unknown key '{field.name}x'; did you mean '{field.name}'?"):
            from_mapping(kind, {f"{field.name}x": 1}, "here")
