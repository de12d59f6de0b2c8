"""Hub data sets, with the library `datasets` played by a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from quantc.calib_data import load_documents
from quantc.errors import CalibrationError

MessageOf = Callable[..., str]


def put_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    library = ModuleType("datasets")
    library.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)


@pytest.mark.parametrize(
    ("name", "repo", "config", "streaming", "count"),
    [("c4", "allenai/c4", "en", True, 4000), ("pile", "NeelNanda/pile-10k", None, False, 5000)],
)
def test_hub_documents(
    monkeypatch: pytest.MonkeyPatch, name: str, repo: str, config: str | None, streaming: bool, count: int
) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return ({"text": f"document {i}"} for i in range(5000))

    put_datasets(monkeypatch, load_dataset)
    assert load_documents(name) == [f"document {i}" for i in range(count)]
    assert asked == [((repo, config), {"split": "train", "streaming": streaming})]


def test_wikitext_lines_become_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "",
        " = A river = \n",
        "",
        "It flows .\n",
        " = = Course = = \n",
        "West .\n",
        " = A hill = \n",
        "Steep .",
    ]
    put_datasets(monkeypatch, lambda *_, **__: [{"text": line} for line in lines])
    assert load_documents("wikitext2") == [
        " = A river = \n\nIt flows .\n = = Course = = \nWest .\n",
        " = A hill = \nSteep .\n",
    ]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, message_of: MessageOf) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host\nmore detail")

    put_datasets(monkeypatch, load_dataset)
    assert message_of(CalibrationError, "c4") == (
        "calibration data set 'c4' (allenai/c4 en, train, first 4000 documents) could not be read from the "
        "Hugging Face hub (ConnectionError: no route to host); "
        "a network connection or a cached copy is needed: "
        "try again online, or pass `--calib FILE` or `--calib builtin`."
    )


def test_hub_lost_on_the_way(monkeypatch: pytest.MonkeyPatch, message_of: MessageOf) -> None:
    def rows() -> Any:
        yield {"text": "first"}
        raise TimeoutError

    put_datasets(monkeypatch, lambda *_, **__: rows())
    assert "(TimeoutError: no message)" in message_of(CalibrationError, "pile")


def test_hub_data_without_text(monkeypatch: pytest.MonkeyPatch, message_of: MessageOf) -> None:
    put_datasets(monkeypatch, lambda *_, **__: [{"text": ""}])
    text = message_of(CalibrationError, "pile")
    assert text.startswith("calibration data set 'pile' (NeelNanda/pile-10k, train) holds no text; ")


def test_hub_without_the_library(monkeypatch: pytest.MonkeyPatch, message_of: MessageOf) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message_of(CalibrationError, "wikitext2") == (
        "calibration data set 'wikitext2' is read through the library 'datasets', which is not installed; "
        "run `pip install datasets`, or pass `--calib FILE` or `--calib builtin`."
    )
