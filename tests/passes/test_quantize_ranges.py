"""Weights that float16 scales cannot hold: folded by powers of two, kept with a note, never lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import quantc
from quantc import api
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import ModelError
from quantc.passes.quantize import OUT_OF_RANGE
from quantc.recipe import Recipe
from quantc.report import Report
from tests.families import VOCAB, build
from tests.helpers import quantize_saved, save_with_tokenizer

Edit = Callable[[PreTrainedModel], None]
ATTENTION = "model.layers.1.self_attn"


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits.float()


def built(folder: Path, edit: Edit, **settings: Any) -> tuple[float, Report]:
    """How far the quantized model's logits are from those of the edited one, as a share; and the report."""
    model = build("llama").eval()
    edit(model)
    expected = logits(model)
    folder.mkdir()
    save_with_tokenizer(model, folder / "model")
    report = quantize_saved(folder, **{"bits": 8, "group_size": 32, **settings})
    found = logits(quantc.load(folder / "packed", dtype=torch.float32))
    return float((found - expected).norm() / expected.norm()), report


def nothing(model: PreTrainedModel) -> None:
    """The model as it is."""


def moved(size: float, rows: slice = slice(None)) -> Edit:
    """Value rows times size, divided by it where o reads them."""

    def edit(model: PreTrainedModel) -> None:
        v, o = (model.get_submodule(f"{ATTENTION}.{name}_proj").weight.data for name in "vo")
        sizes = torch.ones(len(v))
        sizes[rows] = size
        v.mul_(sizes[:, None])
        head = model.get_submodule(ATTENTION).head_dim
        o.div_(sizes.reshape(-1, 1, head).expand(-1, o.shape[1] // len(v), head).reshape(-1))

    return edit


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> float:
    return built(tmp_path_factory.mktemp("usual") / "llama", nothing)[0]


@pytest.mark.parametrize("rows", [slice(None), slice(3, 4)], ids=["all rows", "one row"])
@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e7, 1e12])
def test_what_a_fold_brings_into_range_loses_no_more_than_usual(
    tmp_path: Path, usual: float, size: float, rows: slice
) -> None:
    """The same function as the model as it is, and so the same error but for the draw."""
    lost, report = built(tmp_path / "llama", moved(size, rows))
    assert lost < 1.25 * usual
    assert report.rewrites == {"range": {"value": 1}}
    assert (report.kept, report.refused, report.notes) == ({}, {}, [])


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"calib": "none"}])
def test_folds_need_no_calibration(tmp_path: Path, usual: float, settings: dict[str, Any]) -> None:
    model = build("llama").eval()
    moved(1e-7)(model)
    save_with_tokenizer(model, tmp_path / "model")
    text = {"calib": str(tmp_path / "model/text.txt"), "samples": 4, "seq_len": 32}
    report = quantc.quantize(
        tmp_path / "model", out=tmp_path / "packed", **{"bits": 8, "group_size": 32, **text, **settings}
    )
    found, expected = logits(quantc.load(tmp_path / "packed", dtype=torch.float32)), logits(model)
    assert float((found - expected).norm() / expected.norm()) < 1.25 * usual
    assert report.rewrites["range"] == {"value": 1}
    assert report.kept == {}


def shrunk(*names: str, size: float = 1e-9) -> Edit:
    def edit(model: PreTrainedModel) -> None:
        for name in names:
            model.get_parameter(f"{name}.weight").data.mul_(size)

    return edit


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_no_fold_brings_into_range_is_kept_and_named(tmp_path: Path, usual: float, method: str) -> None:
    """Queries read what keys and values of the usual size read too, and nothing folds into what they write."""
    name = f"{ATTENTION}.q_proj"
    lost, report = built(tmp_path / "llama", shrunk(name), method=method)
    assert report.kept == {name: OUT_OF_RANGE}
    assert name not in {linear.name for linear in report.linears}
    assert f"{name}.weight" in CheckpointReader(tmp_path / "llama/packed").weight_map
    assert lost < 1.25 * usual


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_a_table_outside_the_blocks_is_kept_too(tmp_path: Path, usual: float, size: float) -> None:
    lost, report = built(tmp_path / "llama", shrunk("lm_head", size=size), head_bits=8)
    assert report.kept == {"lm_head.weight": OUT_OF_RANGE}
    assert lost < 2 * usual  # the embedding is rounded too


@pytest.mark.slow
def test_a_size_is_kept_where_a_linear_is_kept_besides(tmp_path: Path) -> None:
    """The plan is made again with less, as for floats that passes have edited."""
    size = 135_000
    _, report = built(tmp_path / "llama", shrunk(f"{ATTENTION}.q_proj"), size=size, bits=None, group_size=None)
    assert f"{ATTENTION}.q_proj" in report.kept
    assert report.weights_bytes <= size


def test_single_rows_out_of_range_are_noted(tmp_path: Path) -> None:
    def edit(model: PreTrainedModel) -> None:
        model.get_parameter(f"{ATTENTION}.q_proj.weight").data[:3] *= 1e-9

    _, report = built(tmp_path / "llama", edit)
    assert report.notes == [
        f"{ATTENTION}.q_proj: 3 rows of weights too small or too large for float16 scales; where they matter, keep it "
        "(--pin NAME=16)"
    ]
    assert report.kept == {}


def test_groups_of_zeros_put_out_nothing(tmp_path: Path) -> None:
    """Where a scale of 1 would leave the rounding errors of float32 sums in the step that makes one token."""

    def edit(model: PreTrainedModel) -> None:
        model.get_parameter(f"{ATTENTION}.q_proj.weight").data[:8] = 0

    built(tmp_path / "llama", edit)
    layer = quantc.load(tmp_path / "llama/packed", dtype=torch.float32).get_submodule(f"{ATTENTION}.q_proj")
    rows = 3 + torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(rows).abs()
    assert float(found[:, :8].max()) < 1e-9 * float(found[:, 8:].max())


def far(name: str) -> Edit:
    def edit(model: PreTrainedModel) -> None:
        weight = model.get_parameter(f"{name}.weight").data
        weight.copy_(1 + 0.002 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))

    return edit


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_far_from_zero_get_a_rank_for_what_they_have_in_common(tmp_path: Path, method: str) -> None:
    """The spread is what tells channels apart; in a range that contains 0 it is half a step of 8 bits."""
    name = f"{ATTENTION}.q_proj"
    _, report = built(tmp_path / "llama", far(name), method=method)
    linear = next(linear for linear in report.linears if linear.name == name)
    assert linear.spec.rank == 1
    assert linear.why == "its weights are far from 0: a rank of 1 holds what rows have in common"
    assert {other.spec.rank for other in report.linears if other.name != name} == {0}
    spread = 0.002**2  # the share of the energy that is spread, which steps of 1 / 255 lose a third of
    assert linear.error < spread / 1000


def test_a_plan_is_left_as_it_is_and_the_note_says_what_to_do(tmp_path: Path) -> None:
    name = f"{ATTENTION}.q_proj"
    built(tmp_path / "first", nothing)
    _, report = built(
        tmp_path / "second", far(name), plan=tmp_path / "first/packed/plan.yaml", bits=None, group_size=None
    )
    assert report.notes == [
        f"{name}: its weights are far from 0, and groups that contain 0 leave few codes for how they differ; give it a "
        "rank of 1 in the plan, or keep it"
    ]
    assert {linear.spec.rank for linear in report.linears} == {0}


def test_a_plan_with_a_rank_uses_it_for_what_rows_have_in_common(tmp_path: Path) -> None:
    name = f"{ATTENTION}.q_proj"
    passes = [{"allocate": {}}, {"compensate": {"rank": 2}}, {"quantize": {}}]
    _, report = built(tmp_path / "llama", far(name), recipe=Recipe.from_dict({"version": 1, "passes": passes}))
    linear = next(linear for linear in report.linears if linear.name == name)
    assert linear.spec.rank == 2
    assert linear.error < 0.002**2 / 1000


def test_a_target_refuses_what_it_could_not_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        built(tmp_path / "llama", shrunk(f"{ATTENTION}.q_proj"), target="vllm")
    assert str(caught.value) == (
        f"float16 scales cannot hold its weights: those of {ATTENTION}.q_proj, which vllm has to load in the format of "
        "its siblings; rescale that weight, or leave --target out."
    )


@pytest.mark.slow
def test_a_budget_is_shared_as_if_weights_were_in_range(tmp_path: Path) -> None:
    """Where every width seems to lose all of v, it would get the fewest bits."""
    plans = []
    for name, edit in (("usual", nothing), ("moved", moved(2.0**-23))):
        model = build("llama").eval()
        edit(model)
        save_with_tokenizer(model, tmp_path / name)
        text = str(tmp_path / name / "text.txt")
        plans.append(api.plan(tmp_path / name, avg_bits=4.5, calib=text, samples=4, seq_len=32).plan.specs)
    assert plans[0] == plans[1]
