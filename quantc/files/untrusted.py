"""Reads JSON and YAML that somebody else may have written.

Whatever is wrong with such a text is a ValueError, and whatever is wrong with its file an OSError: no RecursionError
from brackets in brackets, no memory eaten by a page of YAML aliases, no wait for a pipe that nobody writes to.
"""

from __future__ import annotations

import json
import math
import stat
import types
import typing
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 100  # mappings and lists inside each other: transformers' own configs have fewer than 10
MOST_NODES = 1_000_000  # of a YAML document with its aliases written out
MOST_BITS = 128  # of a whole number; tokenizers have 10**30 for "no limit"
LONGEST_WORD = 200  # characters that are compared when a known name is looked for; that takes quadratic time
LONGEST_NAME = 255  # bytes of a file's name on every usual file system
MOST_BYTES = 256 << 20  # an index of 100,000 tensors has 10 MB
_WORDS: dict[Any, str] = {  # for annotations
    float: "a finite number", int: "a whole number", bool: "true or false", str: "a text", type(None): "null",
}  # fmt: skip


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds; raises ValueError for one that is damaged or nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    _check_content(content)
    return content


def parse_yaml(text: str) -> Any:
    """Return what a YAML document holds; raises ValueError for one that is damaged, too deep, or huge once aliases are
    written out."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _count_nodes(root)
        content = loader.construct_document(root)
        _check_content(content)
        return content
    except RecursionError as error:
        raise ValueError(_too_deep()) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_json(file: Path) -> Any:
    """Return what a JSON file holds; raises OSError or ValueError."""
    return parse_json(read_text(file))


def read_yaml(file: Path) -> Any:
    """Return what a YAML file holds; raises OSError or ValueError."""
    return parse_yaml(read_text(file))


def read_text(file: Path) -> str:
    """Return a UTF-8 file's text; raises OSError for no regular file, ValueError for other or too many bytes."""
    facts = file.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(f"{file} is not a regular file")
    if facts.st_size > MOST_BYTES:
        raise ValueError(f"it has {facts.st_size} bytes, and {MOST_BYTES} are the most that is read")
    return file.read_text(encoding="utf-8")


def is_plain_name(name: str) -> bool:
    """Return whether a name from a file can only be that of a file in the same folder."""
    inside = name not in {"", ".", ".."} and Path(name).name == name and "\0" not in name
    return inside and len(name.encode()) <= LONGEST_NAME


def nearest(word: object, known: Iterable[str], cutoff: float = 0.0) -> str | None:
    """Return the known name most like a word from a file, None where none is."""
    return next(iter(get_close_matches(str(word)[:LONGEST_WORD], list(known), n=1, cutoff=cutoff)), None)


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value from a file has an annotated type; true is no number, and no number is NaN or infinite."""
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and _items_fit(value, arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _items_fit(values: Sequence[Any], hints: tuple[Any, ...]) -> bool:
    if hints[-1] is Ellipsis:
        return all(fits(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(fits, values, hints))


def describe(hint: Any) -> str:
    """Return an annotation in words, for the error about a value that is none of it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in arguments)
    if origin in (tuple, list):
        return f"a list of {describe(arguments[0])}"
    if origin is dict:
        return "a mapping of {} to {}".format(*map(describe, arguments))
    return _WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def _check_content(content: Any) -> None:
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        if any(isinstance(value, int) and value.bit_length() > MOST_BITS for value in level):
            raise ValueError(f"it has a whole number of more than {MOST_BITS} bits")
        if any(isinstance(value, str) and not _is_text(value) for value in level):
            raise ValueError("it has half of a character, a surrogate without the other one")
        level = [item for value in level for item in _inside(value)]
        if not level:
            return
    raise ValueError(_too_deep())


def _is_text(value: str) -> bool:
    """Return whether a string can be encoded: JSON can escape what no encoding has."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, list) else ()


def _count_nodes(root: yaml.Node) -> None:
    counts: dict[int, int] = {}  # by the identity of a node; 0 while its own children are counted

    def count(node: yaml.Node, depth: int) -> int:
        if depth > DEEPEST:
            raise ValueError(_too_deep())
        known = counts.get(id(node))
        if known == 0:
            raise ValueError("an alias is inside what it names")
        if known is None:
            counts[id(node)] = 0
            known = counts[id(node)] = 1 + sum(count(child, depth + 1) for child in _children(node))
        if known > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES} entries once its aliases are written out")
        return known

    count(root, 0)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (child for pair in node.value for child in pair)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _too_deep() -> str:
    return f"it has more than {DEEPEST} lists or mappings inside each other"
