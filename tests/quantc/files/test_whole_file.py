"""JSON with names that the locale could not decode."""

from __future__ import annotations

import json

import pytest

from quantc.files.untrusted import parse_json
from quantc.files.whole_file import json_text


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("größe".encode().decode("ascii", "surrogateescape"), "größe"),
        (b"gr\xf6sse".decode("ascii", "surrogateescape"), "gr\ufffdsse"),
        ("größe 😀", "größe 😀"),
        ("a\\udcc3", "a\\udcc3"),
    ],
)
def test_names_are_text_that_every_reader_takes(name: str, read: str) -> None:
    assert parse_json(json_text({"path": [name]}, indent=1)) == {"path": [read]}


def test_what_is_text_already_is_as_json_has_it() -> None:
    content = {"b": [1, 0.5, None, "größe 😀"], "a": {}}
    assert json_text(content, sort_keys=True) == json.dumps(content, sort_keys=True)
