"""How the embedding and the head are stored by default, and where that is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc import api
from quantc.checkpoint.reader import CheckpointReader
from quantc.driver.job import Job
from quantc.frontend import open_model
from quantc.planning.formats import Formats
from quantc.planning.head import default_specs
from quantc.planning.settings import AllocateConfig
from quantc.spec import QuantSpec
from tests.families import build
from tests.helpers import opened_run, save_with_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNIFORM: dict[str, Any] = {"bits": 4, "method": "rtn", "calib": "none"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("head")
    for name, family in (("tied", "gemma"), ("untied", "llama")):
        save_with_tokenizer(build(family), place / name)
    return place


def planned(folder: Path, **settings: Any) -> dict[str, QuantSpec | None]:
    """Return what is planned for the embedding and the head."""
    job = Job.of(settings, None, "cpu", None)  # type: ignore[arg-type]
    specs = job.open(open_model(folder), "").plan.specs
    return {name: specs[name] for name in (EMBEDDING, HEAD) if name in specs}


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_both_have_8_bits_and_ties_stay_tied(folders: Path, tmp_path: Path, name: str) -> None:
    report = quantc.quantize(folders / name, out=tmp_path / "out", **UNIFORM)
    reader = CheckpointReader(tmp_path / "out")
    wanted = {EMBEDDING} if name == "tied" else {EMBEDDING, HEAD}
    assert {entry for entry in reader.entries if entry in (EMBEDDING, HEAD)} == wanted
    assert all(reader.entries[entry].spec.bits == 8 for entry in wanted)
    kept = quantc.quantize(folders / name, out=tmp_path / "kept", head_bits="keep", **UNIFORM)
    assert report.weights_bytes < kept.weights_bytes
    tokens = torch.arange(3, 24).unsqueeze(0)
    with torch.no_grad():
        found, floats = (quantc.load(tmp_path / each)(input_ids=tokens).logits for each in ("out", "kept"))
    assert (found - floats).norm() < 0.02 * floats.norm()


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"bits": 2}, 8),
        ({"bits": 5}, 8),
        ({"bits": 6}, None),
        ({"bits": 8}, None),
        ({"avg_bits": 8.0}, 8),
        ({"size": "1MB"}, 8),
        ({"bits": 4, "head_bits": "keep"}, None),
        ({"bits": 8, "head_bits": 4}, 4),
        ({"bits": 4, "group_size": 32, "target": "vllm"}, None),
        ({"bits": 4, "group_size": 16, "formats": ("w4g16",)}, None),
    ],
)
def test_where_the_default_holds(folders: Path, settings: dict[str, Any], bits: int | None) -> None:
    found = planned(folders / "tied", **settings)
    assert (found[EMBEDDING].bits if found else None) == bits  # type: ignore[union-attr]


def test_groups_divide_the_width_whatever_the_group_size_of_the_blocks(folders: Path) -> None:
    spec = planned(folders / "tied", bits=4, group_size=-1)[EMBEDDING]
    assert spec is not None
    width = open_model(folders / "tied").model.config.hidden_size
    assert width % spec.group_size == 0
    assert spec.grouping == "per_oc"


def test_what_is_no_matrix_stays_as_it_is(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened_run(folders / "untied")
    monkeypatch.setattr(run.source.model, "get_parameter", lambda name: torch.empty(3, 4, 5))
    assert default_specs(run, Formats(AllocateConfig())) == {}


def test_a_model_that_fits_as_it_is_keeps_both(folders: Path) -> None:
    text = str(folders / "tied/text.txt")
    run = api.plan(folders / "tied", size="1GB", calib=text, samples=4, seq_len=32)
    assert set(run.plan.specs.values()) == {None}
