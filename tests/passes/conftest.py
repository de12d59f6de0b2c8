"""The tiny model's outliers, for all passes that take their cost back: each recipe is quantized and scored once."""

from __future__ import annotations

import pytest

from tests.outliers import OutlierLab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> OutlierLab:
    return OutlierLab(tmp_path_factory.mktemp("outliers"))
