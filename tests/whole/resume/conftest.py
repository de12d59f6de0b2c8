"""A model, and what an interrupted run of it left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.whole.resume.runs import BLOCK, FAST, interrupt, quantize


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, the head tied to the embedding, one block without rotary positions."""
    return save_with_tokenizer(build("smollm3"), tmp_path_factory.mktemp("four") / "model")


@pytest.fixture(scope="session")
def interrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, lambda: quantize(model, place / "out", **FAST), BLOCK.format(2))
    return place / "out.unfinished"


@pytest.fixture
def kept(interrupted: Path, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted in its third block."""
    return shutil.copytree(interrupted, tmp_path / "out.unfinished")
