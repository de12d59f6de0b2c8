"""Folders that quantc exports, loaded by the runtimes that they are for: their logits are quantc's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.readers import environments, lab
from tests.readers.claims import CLAIMS, Claim, cells

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_cell_of_the_table_of_targets(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    model = lab.save("llama", tmp_path / "model")
    expected = {
        name: lab.exported(model, claim.target, tmp_path / str(number), **settings)
        for number, (name, settings) in enumerate(cells(claim))
    }
    assert lab.disagreements(claim.reader, expected, claim.error) == ""


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_every_architecture(claim: Claim, tmp_path: Path) -> None:
    environments.require(claim.reader)
    expected = {
        name: lab.exported(
            lab.save(name, tmp_path / name / "model"), claim.target, tmp_path / name, bits=4, symmetric=True
        )
        for name in lab.MODELS
    }
    assert lab.disagreements(claim.reader, expected, claim.error) == ""
