"""Reading JSON and YAML of unknown origin: every fault is a ValueError or an OSError, soon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantc.files.untrusted import DEEPEST, is_plain_name, parse_json, parse_yaml, read_json, read_text

ALIAS_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize("depth", [DEEPEST, 2000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_in_too_many_brackets_is_refused(depth: int, opening: str, closing: str) -> None:
    with pytest.raises(ValueError, match="inside each other"):
        parse_json(opening * depth + "1" + closing * depth)


@pytest.mark.parametrize("text", ["[" * 2000 + "]" * 2000, "- " * 2000 + "x"])
def test_yaml_in_too_many_brackets_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="inside each other"):
        parse_yaml(text)


def test_brackets_as_deep_as_allowed_are_read() -> None:
    depth = DEEPEST - 1
    assert parse_json("[" * depth + "]" * depth) == parse_yaml("[" * depth + "]" * depth)


def test_yaml_of_a_billion_aliases_is_refused() -> None:
    with pytest.raises(ValueError, match="aliases are written out"):
        parse_yaml(ALIAS_BOMB)


def test_yaml_that_contains_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="inside what it names"):
        parse_yaml("a: &a [*a]")


def test_yaml_with_an_anchor_is_read() -> None:
    assert parse_yaml("a: &a {bits: 4}\nb: *a") == {"a": {"bits": 4}, "b": {"bits": 4}}


@pytest.mark.parametrize(
    "text", ["9" * 5000, "{", "[1,]", "\ud800", '"\\ud800"', '{"a": ["\\udfff"]}', '{"\\ud800": 1}']
)
def test_damaged_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "text", ["9" * 5000, "a: [", "a: *b", "2020-99-99", "!!python/object:os.system {}", "? [a]\n: b"]
)
def test_damaged_yaml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "", "..", ".", "a\0", "a" * 256, "\u00e4" * 128])
def test_a_name_that_is_not_of_a_file_in_the_same_folder(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize("name", ["a", "a" * 255, "\u00e4" * 127, "model-00001-of-00002.safetensors"])
def test_a_plain_name(name: str) -> None:
    assert is_plain_name(name)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "config.json")


def test_other_bytes_than_utf8_are_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError):
        read_text(tmp_path / "config.json")
