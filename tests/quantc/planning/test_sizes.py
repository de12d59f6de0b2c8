"""A checkpoint that is larger than its source says why, and which option mends that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.planning.sizes import notes_on_size
from tests.families import build
from tests.helpers import opened_run, save_with_tokenizer

RTN: dict[str, Any] = {"method": "rtn", "calib": "none"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, so that 8 bits in groups of 2 take more than it does."""
    return save_with_tokenizer(build("llama").to(torch.bfloat16), tmp_path_factory.mktemp("sizes") / "model")


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"bits": 8, "group_size": 2}, "codes and scales of layers; fewer --bits or a larger --group-size makes"),
        ({"bits": 8, "group_size": 2, "pins": {"*_proj": 16}}, None),
    ],
)
def test_a_note_says_what_takes_most(model: Path, tmp_path: Path, settings: dict[str, Any], cause: str | None) -> None:
    report = quantc.quantize(model, out=tmp_path / "out", **settings, **RTN)
    notes = [note for note in report.notes if "larger than its source" in note]
    assert len(notes) == (report.weights_bytes > report.source_bytes)
    assert all(cause is not None and cause in note for note in notes)
    assert bool(notes) == (cause is not None)


def test_the_head_is_named_with_its_dtype_and_its_option(model: Path) -> None:
    run = opened_run(model)
    run.plan.specs.update(dict.fromkeys(run.graph.linears))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        run.source.model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(
            torch.empty(5000, 64, device="meta")
        )
    run.report.source_bytes, run.report.weights_bytes = 1_000_000, 1_500_000
    assert notes_on_size(run) == [
        "the checkpoint is larger than its source (1.50 MB after 1.00 MB): 1.28 MB of it are the embedding and the "
        "head in bfloat16; --head-bits 8 makes them smaller"
    ]


@pytest.mark.parametrize("source", [0, 1_500_000, 2_000_000])
def test_there_is_no_note_without_growth_or_without_a_source_to_compare_with(model: Path, source: int) -> None:
    run = opened_run(model)
    run.report.source_bytes, run.report.weights_bytes = source, 1_500_000
    assert notes_on_size(run) == []
