"""Everything that reads a file of unknown origin, one row each: what is mutated, and how it is read."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import quantc
from quantc.calib_data import load_documents
from quantc.calibration.tokens import tokenize_documents
from quantc.checkpoint.journal import difference, read_journal
from quantc.checkpoint.reader import CheckpointReader, verify
from quantc.cli import main, tables
from quantc.cli.console import make_console
from quantc.cli.failures import BUG
from quantc.evaluation.text import read_text
from quantc.evaluation.windows import make_windows
from quantc.frontend import open_model, to_meta
from quantc.graph.derive import derive
from quantc.pages import report_page
from quantc.pipeline.base import check_order
from quantc.plan import read_plan
from quantc.recipe import read_recipe
from quantc.report import Report, read_report
from quantc.units import to_printable
from tests.families import VOCAB
from tests.fuzz import corpus
from tests.word_tokenizer import make_tokenizer


@dataclass(frozen=True)
class Reader:
    """share: of all cases, relative to the other readers. folder: of the corpus, copied whole; files: of it, one of
    which is mutated. read: gets the folder's copy; anything but a QuantcError is a failure, AssertionError too.
    writes: it changes the folder, and gets a new copy each time.
    """

    name: str
    share: int
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Any] = field(repr=False)
    writes: bool = False


@cache
def _tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))


@cache
def _reference(packed: Path) -> torch.Tensor:
    return _logits(quantc.load(packed, verify=True, dtype=torch.float32))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(_tokens()).logits


@cache
def _graph(model: Path) -> Any:
    source = open_model(model)
    return derive(source.model, source.load, to_meta)


@cache
def _journal(alone: Path) -> Any:
    return read_journal(alone)


class Table:
    """The readers on one corpus."""

    def __init__(self, folder: Path):
        self.folder = folder
        weights, config = "model.safetensors", "config.json"
        shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
        whole = (shard, config, "quantc.json", index)
        self.rows = (
            Reader("plan", 230, "alone", ("plan.yaml",), self._plan),
            Reader("recipe", 230, "alone", ("recipe.yaml",), _recipe),
            Reader("journal", 110, "alone", ("resume.json",), self._journal),
            Reader("report", 80, "alone", ("report.json",), _report),
            Reader("calibration", 110, "alone", ("rows.jsonl", "text.txt"), _calibration),
            Reader("checkpoint", 80, "packed", whole, CheckpointReader),
            Reader("verify", 40, "packed", whole, verify),
            Reader("commands", 30, "packed", (*whole, "report.json"), _commands),
            Reader("load", 25, "packed", whole, self._load),
            Reader("from_pretrained", 10, "packed", (shard, "quantc.json"), self._from_pretrained),
            Reader("folder", 35, "model", (weights, config), _folder),
            Reader("shards", 15, "shards", (config, index), _folder),
            Reader("gguf", 15, "gguf", ("model.gguf",), _gguf),
            Reader("resume", 5, ".", ("half.unfinished/resume.json",), corpus.resume, writes=True),
        )

    def _plan(self, folder: Path) -> None:
        read_plan(folder / "plan.yaml").check(_graph(self.folder / "model"), {"model.embed_tokens.weight"})

    def _journal(self, folder: Path) -> None:
        found, intact = read_journal(folder), _journal(self.folder / "alone")
        assert found is not None
        difference(found.identity, intact.identity)

    def _load(self, folder: Path) -> None:
        """What passes every checksum computes what was written."""
        found = _logits(quantc.load(folder, verify=True, dtype=torch.float32))
        assert torch.equal(found, _reference(self.folder / "packed")), "accepted, and the logits differ"

    def _from_pretrained(self, folder: Path) -> None:
        """What is accepted runs; no checksum of weights is compared, and transformers itself reads index and config."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert _logits(model).shape == _reference(self.folder / "packed").shape


def _recipe(folder: Path) -> None:
    passes = read_recipe(folder / "recipe.yaml").build_passes()
    check_order(passes)


def _report(folder: Path) -> None:
    report = read_report(folder)
    page = report_page.render(report)
    assert all(char.isprintable() or char == "\n" for char in page), "the page has control characters"
    screen = make_console()
    with screen.capture() as capture:
        screen.print(tables.inspected(to_printable(report)))
        screen.print(tables.quantized(to_printable(report), ["quantc"]))
    assert all(char.isprintable() or char == "\n" for char in capture.get()), "the table has control characters"
    Report.from_dict(report)


@cache
def _tokenizer() -> Any:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] }} </s> {% endfor %}"
    return tokenizer


def _calibration(folder: Path) -> None:
    for name in ("rows.jsonl", "text.txt"):
        documents = load_documents(str(folder / name))
        tokenize_documents(_tokenizer(), documents, samples=2, seq_len=8, seed=0)
        make_windows(_tokenizer(), read_text(str(folder / name)), context=8)


def _commands(folder: Path) -> None:
    for words in (["verify"], ["inspect"], ["inspect", "--json"], ["report", "-o", str(folder / "page.html")]):
        _run(words[0], str(folder), *words[1:])


def _run(*words: str) -> None:
    """A command ends without a bug, and what it says of a failure is one line."""
    output, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(said):
        try:
            main(list(words), prog_name="quantc")
        except SystemExit as end:
            code = end.code
    assert code != BUG, said.getvalue()
    assert said.getvalue().count("\n") == (1 if code else 0), said.getvalue()
    assert all(char.isprintable() or char == "\n" for char in output.getvalue() + said.getvalue())


def _folder(folder: Path) -> None:
    source = open_model(folder)
    derive(source.model, source.load, to_meta)


def _gguf(folder: Path) -> None:
    source = open_model(folder / "model.gguf")
    derive(source.model, source.load, to_meta)
