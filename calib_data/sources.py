"""Reads calibration documents from files and from data sets on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CalibrationError, UsageError
from ..untrusted import parse_json

_SEPARATOR = re.compile(r"^<\|endof(?:text|document)\|>[ \t\r]*$", re.MULTILINE)
_WIKITEXT_TITLE = re.compile(r"^ = [^=].* = $")  # sections have more signs: " = = Early life = = "


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
    """wikitext comes line by line; an article starts at a line ` = Title = `."""
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


def load_hub(name: str) -> list[str]:
    """The documents of `HUB_DATASETS[name]`, train split; raises CalibrationError when out of reach."""
    spec = HUB_DATASETS[name]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"Calibration data set {name!r} is read through the library 'datasets', which is not installed; "
            f"run `pip install datasets`, or pass `--calib FILE` or `--calib builtin`."
        ) from error
    try:
        rows = load_dataset(spec.repo, spec.config, split="train", streaming=spec.limit is not None)
        documents = list(spec.regroup(row["text"] for row in islice(rows, spec.limit)))
    except Exception as error:  # requests, httpx, aiohttp and fsspec each raise kinds of their own
        raise CalibrationError(
            f"Calibration data set {name!r} ({spec}) could not be read from the Hugging Face hub "
            f"({_in_short(error)}); a network connection or a cached copy is needed: "
            f"try again online, or pass `--calib FILE` or `--calib builtin`."
        ) from error
    return _keep_non_empty(documents, f"data set {name!r} ({spec})")


def load_file(path: Path) -> list[str]:
    """The documents of a .txt, .jsonl or .parquet file.

    Raises UsageError for another ending, CalibrationError for one that is missing, damaged or without text.
    """
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"Calibration file {path} ends in {path.suffix!r}, and {', '.join(FILE_READERS)} are understood; "
            f"convert it, or rename plain text to .txt."
        )
    try:
        documents = reader(path)
    except FileNotFoundError as error:
        raise CalibrationError(
            f"There is no calibration file {path}; check the path, which counts from {Path.cwd()}, "
            f"or pass `--calib builtin`."
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"Calibration file {path} cannot be read ({_in_short(error)}); a readable file is needed: "
            f"check its permissions, or pass `--calib builtin`."
        ) from error
    return _keep_non_empty(documents, f"file {path}")


def _read_txt(path: Path) -> list[str]:
    return split_documents(_read_utf8(path))


def _read_jsonl(path: Path) -> list[str]:
    # Not splitlines(): JSON strings may hold U+2028 and other signs that Python counts as line ends.
    lines = enumerate(_read_utf8(path).split("\n"), start=1)
    return [_text_of_json(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _text_of_json(line: str, where: str) -> str:
    needed = 'each line must be a JSON object with a string "text"; correct or delete that line.'
    try:
        row = parse_json(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not valid JSON ({error}); {needed}") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} is JSON of type {type(row).__name__}; {needed}")
    if "text" not in row:
        raise CalibrationError(f'{where} has no field "text" but {_listed(row)}; {needed}')
    if not isinstance(row["text"], str):
        raise CalibrationError(f'{where} has a "text" of type {type(row["text"]).__name__}; {needed}')
    return row["text"]


def _read_parquet(path: Path) -> list[str]:
    with path.open("rb") as stream:
        columns, values = _parquet_text(stream, path)
    if values is None or any(not isinstance(value, str | None) for value in values):
        raise CalibrationError(
            f'Calibration file {path} has no column "text" of strings but {_listed(columns)}; '
            f'one is needed: rename the column that holds the text to "text".'
        )
    return [value for value in values if value is not None]


def _parquet_text(stream: BinaryIO, path: Path) -> tuple[list[str], list[Any] | None]:
    """The names of all columns, and the values of the column "text" if there is one."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(
            f"Calibration file {path} is read through the library 'pyarrow', which is not installed; "
            f"run `pip install pyarrow`, or convert the file to .jsonl."
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        columns = file.schema_arrow.names
        return columns, file.read(["text"]).column("text").to_pylist() if "text" in columns else None
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(
            f"Calibration file {path} is not valid parquet ({_in_short(error)}); write or download the file again."
        ) from error


FILE_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"Calibration file {path} is not UTF-8 ({error.reason} at byte {error.start}); "
            f"UTF-8 text is needed: convert it, for example with `iconv -t UTF-8`."
        ) from error


def _keep_non_empty(documents: list[str], what: str) -> list[str]:
    kept = [document for document in documents if document.strip()]
    if not kept:
        raise CalibrationError(
            f"Calibration {what} holds no text; at least one non-empty document is needed: "
            f"pass another source, or `--calib builtin`."
        )
    return kept


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing at all"


def _in_short(error: Exception) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line[:200]}"
