"""Files beside a model's weights that a quantized copy carries: settings, templates, vocabularies, licences.

Only files of known kinds, and small ones: other weight formats, training states and .git never match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..units import size
from .weight_files import some

# Written anew, or belonging to the weights, to an adapter, to training, or to the tokenizer.
NOT_CARRIED = {
    "config.json", "quantc.json", "report.json", "resume.json", "request.json", "quantc-run.json", "params.json",
    "adapter_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json",
    "hf_quant_config.json", "model_index.json",
    "trainer_state.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json",
}  # fmt: skip
TEMPLATES = "additional_chat_templates"
TOKENIZER = re.compile(r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json")
# Needed by tokenizers that are no tokenizer.json, and by other runtimes.
VOCABULARY = re.compile(r"vocab\.json|(vocab|merges|dict)\.txt|[^./][^/]*\.(model|tiktoken|vocab|bpe|spm)")
LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|copyright|use_policy|acceptable_use|third[-_]party)[^/]*", re.IGNORECASE
)
LEGAL_ENDINGS = ("", ".txt", ".md", ".rst", ".pdf")
LARGEST = 64 << 20  # bytes: the largest tokenizers and vocabularies have half of that
BLOBS = "blobs"  # the folder of the hub's cache that snapshots link to


def model_files(folder: Path) -> list[Path]:
    """Return the files that a copy carries whatever its tokenizer: settings of generation and processors, chat
    templates, licences and notices."""
    return _carried(folder, _is_of_model)


def tokenizer_files(folder: Path, saved: bool) -> list[Path]:
    """Return the vocabularies of a tokenizer; all of its files where transformers could not read and save it."""
    return _carried(folder, lambda name: _is_of_tokenizer(name, saved))


def notes_on_left(folder: Path, saved: bool) -> list[str]:
    """Return notes on files that would be carried but for their size, or for where they link to."""
    names = ((file, file.relative_to(folder).as_posix()) for file in _files(folder))
    wanted = [file for file, name in names if _is_of_model(name) or _is_of_tokenizer(name, saved)]
    linked = [file.name for file in wanted if not is_inside(file, folder)]
    large = [f"{file.name} ({size(file.stat().st_size)})" for file in wanted if file.stat().st_size > LARGEST]
    found = [(linked, "links to files outside of the model's folder"), (large, "files beside the weights this large")]
    return [f"{what} were not copied: {some(names)}; copy them if they are needed" for names, what in found if names]


def is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is in a folder once links are followed, or is what the hub's cache has for the folder."""
    place, home = file.resolve(), folder.resolve()
    blobs = home.parents[1] / BLOBS if len(home.parents) > 1 and home.parent.name == "snapshots" else home
    return home in place.parents or blobs in place.parents


def _carried(folder: Path, wanted: Callable[[str], bool]) -> list[Path]:
    found = (file for file in _files(folder) if wanted(file.relative_to(folder).as_posix()))
    return [file for file in found if is_inside(file, folder) and file.stat().st_size <= LARGEST]


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files right in a folder, and those among its chat templates."""
    if folder.is_dir():
        for place in (folder, folder / TEMPLATES):
            yield from (file for file in sorted(place.glob("*")) if file.is_file())


def _is_of_tokenizer(name: str, saved: bool) -> bool:
    return bool(VOCABULARY.fullmatch(name) or (not saved and TOKENIZER.fullmatch(name)))


def _is_of_model(name: str) -> bool:
    """Return whether a file, by its name relative to the folder, is of the kinds that every copy carries."""
    if name.startswith(f"{TEMPLATES}/"):
        return name.endswith(".jinja")
    if name.endswith((".json", ".jinja")):
        return name not in NOT_CARRIED and not name.startswith(".") and not _belongs_elsewhere(name)
    return bool(LEGAL.fullmatch(name)) and Path(name).suffix.lower() in LEGAL_ENDINGS


def _belongs_elsewhere(name: str) -> bool:
    return name.endswith((".index.json", "_results.json"))
