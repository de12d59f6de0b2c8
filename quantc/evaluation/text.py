"""The text a model is evaluated on: a file, or a data set's test split joined as the literature does."""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from ..calib_data import Document
from ..calib_data.sources import FILE_READERS, Rows, sift, split_documents
from ..errors import CalibrationError, UsageError


@dataclass(frozen=True)
class HubText:
    """A hub data set whose rows are joined to one text; `limit`: rows that are streamed, None loads all."""

    repo: str
    config: str
    split: str
    joint: str
    limit: int | None

    def __str__(self) -> str:
        return f"{self.repo} {self.config}, {self.split}"


# Joined as GPTQ and the papers after it do, whose numbers are the ones to compare with.
HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "\n\n", None),
    "c4": HubText("allenai/c4", "en", "validation", " ", 1100),
}


def read_text(source: str, notes: list[str] | None = None) -> list[Document]:
    """Return the documents to evaluate on.

    source: a name from `HUB_TEXTS`, which gives one document, or the path of a .txt, .jsonl or .parquet
        file. A .txt file is one document to the last byte, unless lines `<|endoftext|>` part it into stories;
        the other two hold one document or conversation a row.
    notes: gets a sentence where rows say nothing and were skipped.

    Raises UsageError for an unknown source, CalibrationError for one that cannot be read or holds no text.
    """
    if source in HUB_TEXTS:
        return [_load_split(source, HUB_TEXTS[source])]
    if Path(source).suffix.lower() in FILE_READERS or os.path.isfile(source):
        return _read_file(Path(source), notes)
    names = list(HUB_TEXTS)
    nearest = get_close_matches(source.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "pass one of those."
    raise UsageError(
        f"evaluation text {source!r} is neither a known name nor a file: known are {', '.join(names)} "
        f"and files ending in {', '.join(FILE_READERS)}; {hint}"
    )


def _read_file(path: Path, notes: list[str] | None) -> list[Document]:
    reader = _read_txt if path.suffix.lower() == ".txt" else FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"evaluation text {path} ends in {path.suffix!r}, and {', '.join(FILE_READERS)} are understood; "
            f"convert it, or rename plain text to .txt."
        )
    try:
        documents = sift(reader(path), f"evaluation text {path}", notes)
    except FileNotFoundError as error:
        raise CalibrationError(
            f"there is no evaluation text {path}; check the path, which counts from {Path.cwd()}."
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"evaluation text {path} cannot be read ({error.strerror or error}); check its permissions."
        ) from error
    if not documents:
        raise CalibrationError(
            f"evaluation text {path} holds no text; at least one non-empty document is needed: pass another file."
        )
    return documents


def _read_txt(path: Path) -> Rows:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"evaluation text {path} is not UTF-8 ({error.reason} at byte {error.start}); "
            f"convert it, for example with `iconv -t UTF-8`."
        ) from error
    documents = split_documents(text)
    # Splitting trims line ends; a text that is one document keeps them, since a lost one shifts every window.
    return Rows([text] if documents == [text.strip("\r\n")] else list(documents))


def _load_split(name: str, split: HubText) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"the data set {name!r} needs the package datasets, which is not installed; "
            f"run `pip install datasets`, or pass --text FILE."
        ) from error
    try:
        rows = load_dataset(split.repo, split.config, split=split.split, streaming=split.limit is not None)
        return split.joint.join(row["text"] for row in islice(rows, split.limit))
    except Exception as error:  # requests, httpx, aiohttp and fsspec each raise kinds of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CalibrationError(
            f"evaluation data set {name!r} ({split}) could not be read from the Hugging Face hub ({reason}); "
            f"a network connection or a cached copy is needed: try again online, or pass `--text FILE`."
        ) from error
