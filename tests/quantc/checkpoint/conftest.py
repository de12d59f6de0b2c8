"""A checkpoint of random codes, and a model to quantize."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.checkpoint.small import write


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("source") / "model")
