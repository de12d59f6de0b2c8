"""docs/reliability.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
NAMED = re.findall(r"`([\w/]+\.py)::(\w+|\*)`", PAGE.read_text(encoding="utf-8"))


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | kept by |"]
    assert len(promises) > 30
    assert all(re.search(r"`[\w/]+\.py::(\w+|\*)`", row) for row in promises)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=str)
def test_a_test_that_is_named_is_there(file: str, name: str) -> None:
    defined = re.findall(r"^def (test_\w+)\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert defined if name == "*" else name in defined
