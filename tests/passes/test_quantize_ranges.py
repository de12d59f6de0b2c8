"""Weights that float16 scales cannot hold: folded by powers of two, kept with a note, never lost in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import quantc
from quantc.checkpoint import CheckpointReader
from quantc.passes.quantize import OUT_OF_RANGE
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
