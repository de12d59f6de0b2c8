"""What the tests of the loaders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quantc.calib_data import load_documents


@pytest.fixture
def message_of() -> Callable[..., str]:
    """(error type, source, options) -> the message with which load_documents refuses that source."""

    def load_and_fail(error: type[Exception], source: Any, **options: Any) -> str:
        with pytest.raises(error) as caught:
            load_documents(str(source), **options)
        return str(caught.value)

    return load_and_fail
