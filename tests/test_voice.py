"""How quantc speaks: error messages everywhere, and docstrings in the folders that are held to their form.

A message is one sentence that says what was found, what is needed and what to do. Messages are read from the source:
what a test would have to provoke, hundreds of times, is one walk over syntax trees.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from quantc import errors

ROOT = Path(__file__).parents[1]
FOLDERS = ("quantc", "passes", "kernels", "calib_data")
# Docstrings of everything public in these start with a verb or, of classes and modules, with what the thing is.
VERBS_FIRST = ("quantc", "passes", "kernels", "calib_data")

ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
NO_VERBS = """
    a an the this that these those it its their his her our your of for from in on at by to with without within
    inside as if is are was whether how what which who where when why no none not nothing never every each all both
    any some most only one two three same other others such more less so many much here there and but or
"""
BANNED = (
    "shared? out", "shares? out", "sharing out", "kept aside", "keep some aside", "lies", "stands", "in work",
    "so many", "in all", "has no say", "have no say", "to be had", "as JSON has it", "turned",
)  # fmt: skip
PLACEHOLDER = "\N{BLACK SQUARE}"


@cache
def sources(folder: str) -> list[tuple[str, ast.Module]]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [(str(file.relative_to(ROOT)), ast.parse(file.read_text(encoding="utf-8"))) for file in files]


def texts(node: ast.expr | None) -> list[str]:
    """Return the texts an expression can have, with a square for each value that is put in; none if it is no text."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in parts)]
        case ast.IfExp(body=body, orelse=other):
            return texts(body) + texts(other)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [one + two for one in texts(left) or [PLACEHOLDER] for two in texts(right) or [PLACEHOLDER]]
    return []


@cache
def messages() -> list[tuple[str, str]]:
    """Return (place, text) of every message that a QuantcError is raised with, or that a function makes for one."""
    trees = [source for folder in FOLDERS for source in sources(folder)]
    classes = [node for _, tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = ERRORS | {node.name for node in classes if any(called(base) in ERRORS for base in node.bases)}
    all_found = []
    for file, tree in trees:
        makers = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and called(node.func) in kinds:
                first = node.args[0]
                found = texts(first)
                if isinstance(first, ast.Call) and called(first.func) in makers:
                    returned = [item for item in ast.walk(makers[called(first.func)]) if isinstance(item, ast.Return)]
                    found = [text for item in returned for text in texts(item.value)]
                all_found += [(f"{file}:{node.lineno}", text) for text in found]
    return all_found


def called(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def faults(message: str) -> list[str]:
    """Return what is wrong with a message."""
    found = []
    if not re.match(rf"[a-z{PLACEHOLDER}'`~]|--?[a-z]|[A-Z]{{2,}}", message):
        found.append("starts with a capital letter")
    if not re.search(rf"([.?]|[;:] {PLACEHOLDER})$", message):
        found.append("does not end as a sentence")
    if re.search(rf"[.?!] +[A-Z{PLACEHOLDER}]", message):
        found.append("is more than one sentence")
    if not re.search(r"[;:]", message):
        found.append("says nothing after what was found")
    return found + [f"has the words {words!r}" for words in BANNED if re.search(rf"\b{words}\b", message)]


def documented(tree: ast.Module, file: str) -> Iterator[tuple[str, bool, str]]:
    """Yield (place, whether it is a function, docstring) of what is public."""
    yield file, False, ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            function = isinstance(node, ast.FunctionDef) and not any(
                called(item) in ("property", "cached_property") for item in node.decorator_list
            )
            yield f"{file}:{node.lineno} {node.name}", function, ast.get_docstring(node) or ""


def test_there_are_hundreds_of_messages() -> None:
    assert len(messages()) > 250


def test_messages_are_one_sentence_of_a_colleague() -> None:
    wrong = [f"{place} {fault}: {text}" for place, text in messages() for fault in faults(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("The file is no model; pass another.", "starts with a capital letter"),
        ("the file is no model; pass another", "does not end as a sentence"),
        ("the file is no model; pass another. It may be empty.", "is more than one sentence"),
        ("the file is no model.", "says nothing after what was found"),
        ("the level mmx is not to be had here; pass avx2.", "has the words 'to be had'"),
    ],
)
def test_a_message_in_another_form_is_found(message: str, fault: str) -> None:
    assert faults(message) == [fault]


@pytest.mark.parametrize("folder", VERBS_FIRST)
def test_docstrings_say_what_a_function_does(folder: str) -> None:
    wrong = []
    for file, tree in sources(folder):
        for place, function, text in documented(tree, file):
            first = text.split(maxsplit=1)[0] if text else ""
            if text and function and re.sub(r"\W", "", first).lower() in NO_VERBS.split():
                wrong.append(f"{place}: {text.splitlines()[0]}")
            wrong += [f"{place} has {words!r}" for words in BANNED if re.search(rf"\b{words}\b", text)]
    assert not wrong, "\n".join(wrong)
