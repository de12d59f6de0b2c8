"""Reads calibration documents from files and from data sets on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CalibrationError, UsageError
from ..files.untrusted import parse_json
from .chat import FIELDS, SHAPES, Document, is_blank, read_row

_SEPARATOR = re.compile(r"^<\|endof(?:text|document)\|>[ \t\r]*$", re.MULTILINE)
_WIKITEXT_TITLE = re.compile(r"^ = [^=].* = $")  # sections have more signs: " = = Early life = = "


MOST_NULL = 0.1  # of the rows of a file: more of them are a damaged file, or one with its text in another field


@dataclass
class Rows:
    """documents: what a file's rows say. null: where there are rows that say nothing, such as "line 3"."""

    documents: list[Document]
    null: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HubDataset:
    """A data set's place on the hub; `limit` streams that many documents, None loads a small set whole."""

    repo: str
    config: str | None
    limit: int | None
    regroup: Callable[[Iterable[str]], Iterable[str]] = iter

    def __str__(self) -> str:
        part = f", first {self.limit} documents" if self.limit else ""
        return f"{self.repo}{f' {self.config}' if self.config else ''}, train{part}"


def split_documents(text: str) -> list[str]:
    """Split at lines of only `<|endoftext|>` or `<|endofdocument|>`; text without them is one document."""
    return [piece.strip("\r\n") for piece in _SEPARATOR.split(text) if piece.strip()]


def join_articles(lines: Iterable[str]) -> Iterator[str]:
    """Join lines of wikitext to articles; an article starts at a line ` = Title = `."""
    article: list[str] = []
    for line in lines:
        if article and _WIKITEXT_TITLE.match(line.rstrip("\n")):
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") else line + "\n")
    yield "".join(article)


HUB_DATASETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", None, regroup=join_articles),
    "c4": HubDataset("allenai/c4", "en", 4000),
    "pile": HubDataset("NeelNanda/pile-10k", None, None),
}


def load_hub(name: str) -> list[Document]:
    """Return the documents of `HUB_DATASETS[name]`, train split; raises CalibrationError when out of reach."""
    spec = HUB_DATASETS[name]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"calibration data set {name!r} is read through the library 'datasets', which is not installed; "
            f"run `pip install datasets`, or pass `--calib FILE` or `--calib builtin`."
        ) from error
    try:
        rows = load_dataset(spec.repo, spec.config, split="train", streaming=spec.limit is not None)
        documents = list(spec.regroup(row["text"] for row in islice(rows, spec.limit)))
    except Exception as error:  # requests, httpx, aiohttp and fsspec each raise kinds of their own
        raise CalibrationError(
            f"calibration data set {name!r} ({spec}) could not be read from the Hugging Face hub "
            f"({_in_short(error)}); a network connection or a cached copy is needed: "
            f"try again online, or pass `--calib FILE` or `--calib builtin`."
        ) from error
    return _keep_non_empty(documents, f"data set {name!r} ({spec})")


def load_file(path: Path, notes: list[str] | None = None) -> list[Document]:
    """Return the documents of a .txt, .jsonl or .parquet file.

    notes: gets a sentence where rows were skipped.
    Raises UsageError for another ending, CalibrationError for one that is missing, damaged or without text.
    """
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"calibration file {path} ends in {path.suffix!r}, and {', '.join(FILE_READERS)} are understood; "
            f"convert it, or rename plain text to .txt."
        )
    try:
        documents = sift(reader(path), f"calibration file {path}", notes)
    except FileNotFoundError as error:
        raise CalibrationError(
            f"there is no calibration file {path}; check the path, which counts from {Path.cwd()}, "
            f"or pass `--calib builtin`."
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read ({_in_short(error)}); a readable file is needed: "
            f"check its permissions, or pass `--calib builtin`."
        ) from error
    return _keep_non_empty(documents, f"file {path}")


def sift(rows: Rows, what: str, notes: list[str] | None) -> list[Document]:
    """Return the documents of a file without blank ones; raises CalibrationError where too many rows are null."""
    count = len(rows.documents) + len(rows.null)
    if len(rows.null) > max(1, MOST_NULL * count):
        raise CalibrationError(
            f"{what} has {len(rows.null)} of {count} rows that say nothing, the first in {rows.null[0]}; up to a tenth "
            "are skipped: delete those rows, or look whether the text is in another field."
        )
    if rows.null and notes is not None:
        notes.append(f"{what}: {rows.null[0]} says nothing; {len(rows.null)} of {count} rows were skipped for that")
    return [document for document in rows.documents if not is_blank(document)]


def _read_txt(path: Path) -> Rows:
    return Rows(list(split_documents(_read_utf8(path))))


def _read_jsonl(path: Path) -> Rows:
    # Not splitlines(): JSON strings may hold U+2028 and other signs that Python counts as line ends.
    lines = {
        f"line {number}": line for number, line in enumerate(_read_utf8(path).split("\n"), start=1) if line.strip()
    }
    return _collect((where, _row_of_json(line, f"{path} {where}")) for where, line in lines.items())


def _row_of_json(line: str, where: str) -> Document | None:
    needed = (
        'each line must be a JSON object with a string "text", a list "messages" or another field that the README '
        "lists; correct or delete that line."
    )
    try:
        row = parse_json(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not valid JSON ({error}); {needed}") from error
    if row is not None and not isinstance(row, dict):
        raise CalibrationError(f"{where} is JSON of type {type(row).__name__}; {needed}")
    try:
        return read_row(row or {})
    except ValueError as error:
        raise CalibrationError(f"{where} {error}; {needed}") from error


def _read_parquet(path: Path) -> Rows:
    with path.open("rb") as stream:
        columns, rows = _parquet_rows(stream, path)
    try:
        return _collect((f"row {number}", read_row(row)) for number, row in enumerate(rows, start=1))
    except ValueError as error:
        raise CalibrationError(
            f'calibration file {path} has no column "text" of strings but {_listed(columns)} (a row {error}); '
            f'one is needed, or a column "messages" or another one that the README lists: rename yours.'
        ) from error


def _collect(places: Iterable[tuple[str, Document | None]]) -> Rows:
    rows = Rows([])
    for where, document in places:
        if document is None:
            rows.null.append(where)
        else:
            rows.documents.append(document)
    return rows


def _parquet_rows(stream: BinaryIO, path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of all columns, and the rows with those columns that quantc understands."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(
            f"calibration file {path} is read through the library 'pyarrow', which is not installed; "
            f"run `pip install pyarrow`, or convert the file to .jsonl."
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        columns = file.schema_arrow.names
        wanted = [name for name in columns if name in FIELDS] if any(name in SHAPES for name in columns) else []
        return columns, file.read(wanted).to_pylist() if wanted else [dict.fromkeys(columns)]
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(
            f"calibration file {path} is not valid parquet ({_in_short(error)}); write or download the file again."
        ) from error


FILE_READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration file {path} is not UTF-8 ({error.reason} at byte {error.start}); "
            f"UTF-8 text is needed: convert it, for example with `iconv -t UTF-8`."
        ) from error


def _keep_non_empty(documents: Iterable[Document], what: str) -> list[Document]:
    kept = [document for document in documents if not is_blank(document)]
    if not kept:
        raise CalibrationError(
            f"calibration {what} holds no text; at least one non-empty document is needed: "
            f"pass another source, or `--calib builtin`."
        )
    return kept


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing at all"


def _in_short(error: Exception) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line[:200]}"
