"""The pages for users: their tables are what the results files say, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)\s]*)?\)")
MOST_LINES_OF_RESULTS = 250


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_tables_are_written_from_the_results_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "run `python -m benchmarks.tables`"


def test_no_two_tables_have_one_name() -> None:
    of_parts = (part.TABLES for part in (tables.quality, tables.speed, tables.gguf, tables.targets, tables.trellis))
    assert len(tables.TABLES) == sum(map(len, of_parts))


def test_a_table_that_was_edited_by_hand_is_noticed() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    edited = page.replace("0.270", "0.170")
    assert edited != page
    assert tables.rewritten(edited) == page


def test_results_stay_short() -> None:
    assert len((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_RESULTS


@pytest.mark.parametrize(
    "page", [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *tables.PAGES], ids=lambda page: page.name
)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert missing == []


def test_the_readme_does_not_send_users_to_the_notebook() -> None:
    assert "notebook" not in (ROOT / "README.md").read_text(encoding="utf-8")
