from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantc.errors import CalibrationError, QuantcError, UsageError
from quantc.evaluation.text import read_text


def message_of(error: type[QuantcError], source: Any) -> str:
    with pytest.raises(error) as caught:
        read_text(str(source))
    return str(caught.value)


def put_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    library = ModuleType("datasets")
    library.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)


def test_plain_text_is_one_document_to_the_last_byte(tmp_path: Path) -> None:
    text = "\n\n = A river = \r\n\n It flows <|endoftext|> on .\n\n"
    (tmp_path / "river.txt").write_bytes(text.encode())
    assert read_text(str(tmp_path / "river.txt")) == [text]


@pytest.mark.parametrize(
    ("text", "stories"), [("A.\n<|endoftext|>\nB.\n", ["A.", "B."]), ("A.\n<|endoftext|>\n", ["A."])]
)
def test_stories(tmp_path: Path, text: str, stories: list[str]) -> None:
    (tmp_path / "stories.txt").write_text(text)
    assert read_text(str(tmp_path / "stories.txt")) == stories


def test_jsonl_holds_a_document_a_row(tmp_path: Path) -> None:
    rows = [{"text": "One."}, {"text": " "}, {"text": "Two."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_text(str(tmp_path / "rows.jsonl")) == ["One.", "Two."]


def test_missing_file(tmp_path: Path) -> None:
    for name in ("gone.txt", "gone.jsonl", "gone.parquet"):
        assert message_of(CalibrationError, tmp_path / name).startswith(
            f"there is no evaluation text {tmp_path / name}; check the path, which counts from {Path.cwd()}"
        )


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    message = message_of(CalibrationError, tmp_path / "folder.txt")
    assert message.endswith("cannot be read (Is a directory); check its permissions.")


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty.txt holds no text; at least one non-empty" in message_of(CalibrationError, tmp_path / "empty.txt")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    message = message_of(CalibrationError, tmp_path / "latin.txt")
    assert "latin.txt is not UTF-8 (invalid continuation byte at byte 3); convert it" in message


def test_other_ending(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("Text.")
    message = message_of(UsageError, tmp_path / "notes.md")
    assert "notes.md ends in '.md', and .txt, .jsonl, .parquet are understood; convert it" in message


def test_unknown_name() -> None:
    message = message_of(UsageError, "wikitext")
    assert message.startswith("evaluation text 'wikitext' is neither a known name nor a file: known are wikitext2, c4")
    assert message.endswith("did you mean 'wikitext2'?")
    assert message_of(UsageError, "qqqqqqqq").endswith("pass one of those.")


@pytest.mark.parametrize(
    ("name", "asked", "text"),
    [
        (
            "wikitext2",
            (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "streaming": False}),
            "\n\n".join(f"row {i}" for i in range(2000)),
        ),
        (
            "c4",
            (("allenai/c4", "en"), {"split": "validation", "streaming": True}),
            " ".join(f"row {i}" for i in range(1100)),
        ),
    ],
)
def test_data_sets_are_one_document(monkeypatch: pytest.MonkeyPatch, name: str, asked: Any, text: str) -> None:
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return ({"text": f"row {i}"} for i in range(2000))

    put_datasets(monkeypatch, load_dataset)
    assert read_text(name) == [text]
    assert calls == [asked]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host\nand more")

    put_datasets(monkeypatch, load_dataset)
    message = message_of(CalibrationError, "wikitext2")
    assert "(Salesforce/wikitext wikitext-2-raw-v1, test) could not be read" in message
    assert "(no route to host); a network connection or a cached copy is needed" in message


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "run `pip install datasets`, or pass --text FILE" in message_of(CalibrationError, "c4")
