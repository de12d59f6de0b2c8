"""Quiet libraries, one thread unless QUANTC_TEST_THREADS says otherwise, no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers.utils import logging as hf_logging

torch.set_num_threads(int(os.environ.get("QUANTC_TEST_THREADS", "1")))
hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests keep on disk is gone with them."""
    os.environ["QUANTC_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def rotation_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass rotate measures on no activation that its rotation loses more."""
    monkeypatch.setattr("quantc.passes.rotate.error_ratio", lambda *_: 0.5)
