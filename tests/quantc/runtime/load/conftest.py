"""Checkpoints, and copies of them that a test may change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import quantc
from tests.families import build
from tests.helpers import save_with_tokenizer


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama with a head of its own, qwen2 with a tied one, each packed in 4 bits, and copies of save_pretrained."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("llama", "qwen2"):
        save_with_tokenizer(build(name), folder / f"{name}-float")
        settings: Any = {"bits": 4, "group_size": 32, "head_bits": "keep", "method": "rtn"}
        quantc.quantize(folder / f"{name}-float", out=folder / name, **settings)
        quantc.load(folder / name).save_pretrained(folder / f"{name}-copy")
    return folder


@pytest.fixture
def packed(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built / "llama", tmp_path / "packed")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """Without a manifest, as save_pretrained writes it."""
    return shutil.copytree(built / "llama-copy", tmp_path / "copy")
