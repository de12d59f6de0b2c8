"""What layers may be stored as under settings, without a model: grids of their own, one format for all, labels."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from quantc.errors import UsageError
from quantc.graph.model_graph import Linear
from quantc.planning.candidates import CANDIDATE_BITS
from quantc.planning.formats import Formats
from quantc.planning.settings import AllocateConfig
from quantc.planning.targets import RUNTIMES, spec_of_code
from quantc.spec import QuantSpec

LINEARS = {name: Linear(name, "linear", shape, "x") for name, shape in {"up": (96, 64), "odd": (64, 40)}.items()}


def formats(**settings: Any) -> Formats:
    return Formats(AllocateConfig(**settings))


def test_groups_divide_the_width_on_the_uniform_grid_and_a_target_has_its_blocks() -> None:
    assert formats().specs(LINEARS) == {"up": QuantSpec(4, 64), "odd": QuantSpec(4, 40)}
    assert formats(target="vllm", group_size=32).specs(LINEARS) == dict.fromkeys(LINEARS, QuantSpec(4, 32))
    assert formats(target="gguf").specs(LINEARS) == {"up": spec_of_code("q4_0"), "odd": None}


@pytest.mark.parametrize(("grouping", "group"), [("per_oc", 64), ("per_ic", 96)])
def test_a_group_size_follows_from_the_dimension_that_is_grouped(grouping: str, group: int) -> None:
    assert formats(grouping=grouping).specs(LINEARS)["up"] == QuantSpec(4, group, grouping)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"formats": ("mxfp4",)}, spec_of_code("mxfp4")),
        ({"formats": ("mxfp4",), "target": "gguf"}, spec_of_code("mxfp4")),
        ({"formats": ("w3g32sym",), "bits": 3}, QuantSpec(3, 32, symmetric=True)),
        ({"formats": ("w3g32sym",), "bits": 4}, QuantSpec(4, 64)),
        ({"formats": ("w4g32",), "group_size": 16}, QuantSpec(4, 16)),
        ({"formats": ("w4g32",), "symmetric": True}, QuantSpec(4, 64, symmetric=True)),
        ({"formats": ("w4g32",), "avg_bits": 4.5}, QuantSpec(4, 64)),
    ],
)
def test_one_format_is_that_of_all_unless_settings_contradict_it(settings: dict[str, Any], spec: QuantSpec) -> None:
    assert formats(**settings).specs(LINEARS)["up"] == spec


def test_one_format_leaves_rows_that_its_blocks_do_not_divide() -> None:
    assert formats(formats=("mxfp4",)).specs(LINEARS)["odd"] is None
    with pytest.raises(UsageError, match="blocks of 32 divide no row of this model"):
        formats(formats=("mxfp4",)).specs({"odd": LINEARS["odd"]})
    with pytest.raises(UsageError, match="no layer can be stored as w4g; pass --formats w4g128"):
        formats(formats=("w4g",))


def test_pins_are_of_the_target_and_keep_to_its_formats() -> None:
    chosen = formats(target="gguf", pins={"up": 8})
    assert chosen.pinned(LINEARS, chosen.specs(LINEARS)) == {"up": spec_of_code("q8_0"), "odd": None}
    kept = formats(pins={"*": 4, "odd": 16})
    planned = {"up": QuantSpec(3, 64), "odd": QuantSpec(3, 40)}
    assert kept.pinned(LINEARS, planned) == {"up": QuantSpec(4, 64), "odd": None}
    with pytest.raises(UsageError, match="up would be stored as w3g64, but only w4g64 may be used"):
        formats(formats=("w4g64",)).pinned(LINEARS, planned)
    with pytest.raises(UsageError, match="vllm does not load w4g16; it loads w4g32, "):
        formats(target="vllm", formats=("w4g16",)).pinned(LINEARS, planned)


def test_candidates_of_linears_have_what_earlier_passes_planned_and_those_of_tables_have_not() -> None:
    planned: dict[str, QuantSpec | None] = {"up": QuantSpec(4, 64, hadamard=32, rank=2), "odd": None}
    tables = {"head": (100, 64)}
    found = formats(avg_bits=4.0, formats=("nf4", "w4g64")).candidates(LINEARS, tables, planned)
    assert found["odd"] == []
    assert {(spec.hadamard, spec.rank) for spec in found["up"]} == {(32, 2)}
    assert {spec.code for spec in found["up"]} == {"uniform", "nf4"}
    assert {(spec.hadamard, spec.rank, spec.code) for spec in found["head"]} == {(0, 0, "uniform")}
    own = formats(avg_bits=4.0, target="gguf").candidates(LINEARS, tables, planned)
    assert own["up"] == own["head"] == RUNTIMES["gguf"].candidates((96, 64))


def test_a_label_that_no_candidate_has_is_refused_with_those_near_it() -> None:
    planned = formats().specs(LINEARS)
    with pytest.raises(UsageError, match=r"stored as w4g48; choose from the \d+ formats .* such as .*w4g"):
        formats(avg_bits=4.0, formats=("w4g48",)).candidates(LINEARS, {}, planned)


def test_uniform_plans_differ_from_what_is_planned_in_bits_alone() -> None:
    planned: dict[str, QuantSpec | None] = {"up": QuantSpec(4, 64, hadamard=32), "odd": None, "head": QuantSpec(3, 16)}
    found = formats(size=1000).uniform(LINEARS, {"head": (100, 64)}, planned)
    up = QuantSpec(4, 64, hadamard=32)
    assert found == {bits: {"up": replace(up, bits=bits), "head": QuantSpec(bits, 64)} for bits in CANDIDATE_BITS}
    own = formats(size=1000, target="gguf").uniform(LINEARS, {}, {"up": spec_of_code("q4_0"), "odd": None})
    assert own[8] == {"up": spec_of_code("q8_0")}
    assert own[5] == {"up": spec_of_code("q5_0")}


@pytest.mark.parametrize(
    ("settings", "covered"),
    [({}, True), ({"target": "gguf"}, True), ({"target": "vllm"}, False), ({"formats": ("w4g32",)}, False)],
)
def test_a_head_is_covered_where_its_formats_are_known(settings: dict[str, Any], covered: bool) -> None:
    assert formats(**settings).cover_head is covered


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({}, ["group sizes 40, 64: 128 does not divide every width of this model"]),
        ({"group_size": 16}, []),
        ({"formats": ("mxfp4",)}, ["2 layers kept as floats, whose rows blocks of 32 do not divide"]),
        (
            {"target": "gguf"},
            [
                "blocks of 32 in 3 layers, whose rows 256 does not divide",
                "2 layers kept as floats, whose rows no block divides",
            ],
        ),
    ],
)
def test_what_the_widths_of_a_model_change_is_noted(settings: dict[str, Any], notes: list[str]) -> None:
    linears, chosen = {**LINEARS, "other": replace(LINEARS["odd"], name="other")}, formats(**settings)
    graph, plan = SimpleNamespace(linears=linears), SimpleNamespace(specs=chosen.specs(linears))
    run: Any = SimpleNamespace(graph=graph, plan=plan, container=None)
    assert chosen.notes(run) == notes
