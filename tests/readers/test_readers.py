"""Folders that quantc exports, loaded by the runtimes that they are for: their logits are quantc's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readers import environments, lab
from tests.readers.claims import CLAIMS, Claim, cells, expert_cells

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_cell_of_the_table_of_targets(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    model = lab.save("llama", tmp_path / "model")
    expected = {}
    for name, settings in cells(claim):
        lab.quantize(model, tmp_path / name / "packed", **settings)
        expected[name] = lab.exported(claim.target, tmp_path / name)
    lab.rotate_heads(model, tmp_path / "heads")
    expected["rotated heads"] = lab.exported(claim.target, tmp_path / "heads")
    assert lab.disagreements(claim.reader, expected, claim.error) == ""


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_architecture(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    expected = {}
    for name in lab.MODELS:
        model = lab.save(name, tmp_path / name / "model")
        lab.quantize(model, tmp_path / name / "packed", bits=4, symmetric=True)
        expected[name] = lab.exported(claim.target, tmp_path / name)
    assert lab.disagreements(claim.reader, expected, claim.error) == ""


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.experts], ids=str)
def test_models_with_experts(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    expected = {}
    for name in claim.experts:
        model = lab.save(name, tmp_path / name / "model")
        for stored, settings in expert_cells(claim):
            out = tmp_path / name / stored
            lab.quantize(model, out / "packed", **settings)
            expected[f"{name}, {stored}"] = lab.exported(claim.target, out)
    assert lab.disagreements(claim.reader, expected, claim.error) == ""
