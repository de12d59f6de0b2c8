"""The page of a comparison: self-contained, escaped, complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import quantc
from quantc.errors import UsageError
from quantc.evaluation.comparison import Compared, Comparison
from quantc.pages import compare_page, plots
from quantc.pages.pareto_page import NO_PLOT, THEMED
from tests.quantc.pages.test_report_page import Page

BLOCKS = [f"model.layers.{at}" for at in range(6)]
FIRST = Compared("model", "float weights", 2_000_000, 32, 20.5, None, None, None, 40.0, "")
THREE = Compared("w3", "packed weights", 300_000, 3.25, 31.25, 0.41, 2.5, 0.7, 60.0, "", [0.1] * 6)
FILE = Compared("m.gguf", "dequantized weights", 400_000, 4.5, 22.5, 0.04, 0.5, 0.9, 80.0, "llama.cpp", None)


@pytest.fixture
def found() -> Comparison:
    return Comparison([FIRST, THREE, FILE], "book.txt", 93, 3, "float32", "", list(BLOCKS), ["m.gguf has no errors"])


def test_the_page_has_every_figure_and_loads_nothing(found: Comparison, tmp_path: Path) -> None:
    file = compare_page.check(tmp_path / "page.html")
    compare_page.write(found, file)
    text = file.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2
    assert page.tags.count("tr") == 1 + len(found.models) + 1 + len(BLOCKS)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert all(value and value.startswith("#") for name, value in page.attributes if name.endswith(("src", "href")))
    for row in found.table()[1]:
        assert all(f">{cell}</td>" in text for cell in row)
    assert not any(colour in text[text.index("<svg") :] for colour in THEMED)
    assert compare_page.check(file) == file  # may be replaced


def test_names_are_escaped() -> None:
    other = Comparison([FIRST, replace(THREE, model="<b>$x^2$ & more")], "<i>", 1, 1, "float32", "")
    text = compare_page.render(other, drawn=True)
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;b&gt;$x^2$ &amp; more" in text


def test_without_matplotlib_there_is_a_page_and_a_note(
    found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    bare = Comparison(found.models, "book.txt", 1, 1, "float32", "")
    compare_page.write(bare, tmp_path / "page.html")
    assert "<svg" not in (tmp_path / "page.html").read_text()
    assert bare.notes == [NO_PLOT]


def test_files_that_quantc_did_not_write_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UsageError, match=r"mine.html exists, and quantc did not write it; pass another --page.$"):
        quantc.compare("nowhere", "else", text="t.txt", page=tmp_path / "mine.html")
    with pytest.raises(UsageError, match="of the page does not exist; make it, or pass another --page"):
        quantc.compare("nowhere", "else", text="t.txt", page=tmp_path / "no/page.html")
