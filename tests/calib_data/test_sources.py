"""Text files load, whatever is wrong with a source is said, and unknown names get a suggestion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantc.calib_data import load_documents
from quantc.errors import CalibrationError, UsageError

MessageOf = Callable[..., str]


def test_txt_without_separators_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeffeins\n\nzwei é <|endoftext|> drei\n".encode())
    assert load_documents(str(path)) == ["eins\n\nzwei é <|endoftext|> drei"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|endofdocument|>"])
def test_txt_is_split_at_separator_lines(tmp_path: Path, mark: str, end: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(end.join([mark, "one", "still one", mark, "", mark, "  two", mark, ""]).encode())
    assert load_documents(str(path)) == [f"one{end}still one", "  two"]


def test_jsonl_gives_the_text_of_each_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "line\u2028sep", "id": 1}, {"text": " "}, {"id": 2, "text": "zwölf"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert load_documents(str(path)) == ["line\u2028sep", "zwölf"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "cut of', "is not valid JSON (Unterminated string starting at: line 1 column 10 (char 9))"),
        ('{"body": "x", "id": 1}', "has none of the fields that are read but 'body', 'id'"),
        ('{"text": 7}', 'has a "text" of type int'),
        ("[1]", "is JSON of type list"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, found: str, message_of: MessageOf) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    needed = (
        'each line must be a JSON object with a string "text", a list "messages" or another field that the README '
        "lists; correct or delete that line."
    )
    assert message_of(CalibrationError, path) == f"{path} line 3 {found}; {needed}"


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_missing_file(tmp_path: Path, ending: str, message_of: MessageOf) -> None:
    path = tmp_path / f"absent.{ending}"
    text = message_of(CalibrationError, path)
    assert text == (
        f"there is no calibration file {path}; check the path, which counts from {Path.cwd()}, "
        f"or pass `--calib builtin`."
    )


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_unreadable_file(tmp_path: Path, ending: str, message_of: MessageOf) -> None:
    path = tmp_path / f"folder.{ending}"
    path.mkdir()
    text = message_of(CalibrationError, path)
    assert text.startswith(f"calibration file {path} cannot be read (IsADirectoryError: ")
    assert text.endswith("a readable file is needed: check its permissions, or pass `--calib builtin`.")


@pytest.mark.parametrize("content", ["", " \n\t\n", "<|endoftext|>\n<|endoftext|>\n"])
def test_empty_file(tmp_path: Path, content: str, message_of: MessageOf) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    assert message_of(CalibrationError, path) == (
        f"calibration file {path} holds no text; at least one non-empty document is needed: "
        f"pass another source, or `--calib builtin`."
    )


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_file_that_is_not_utf8(tmp_path: Path, ending: str, message_of: MessageOf) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes("für".encode("latin-1"))
    assert message_of(CalibrationError, path) == (
        f"calibration file {path} is not UTF-8 (invalid start byte at byte 1); "
        f"UTF-8 text is needed: convert it, for example with `iconv -t UTF-8`."
    )


def test_file_with_an_ending_nobody_reads(tmp_path: Path, message_of: MessageOf) -> None:
    path = tmp_path / "notes.md"
    path.write_text("text")
    assert message_of(UsageError, path) == (
        f"calibration file {path} ends in '.md', and .txt, .jsonl, .parquet are understood; "
        f"convert it, or rename plain text to .txt."
    )


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("wikitext-2", "did you mean 'wikitext2'?"),
        ("Builtin", "did you mean 'builtin'?"),
        ("slef", "did you mean 'self'?"),
        ("xyzzy", "pass one of those."),
    ],
)
def test_unknown_source_offers_the_nearest(source: str, hint: str, message_of: MessageOf) -> None:
    assert message_of(UsageError, source, also_known=("self", "none")) == (
        f"calibration source {source!r} is neither a known name nor a file: "
        f"known are builtin, wikitext2, c4, pile, self, none and files ending in "
        f".txt, .jsonl, .parquet; {hint}"
    )
