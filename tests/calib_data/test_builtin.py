"""The built-in text keeps its promises: size, variety, order, no repetition."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from quantc.calib_data import load_documents
from quantc.calib_data.builtin import load_genres

GENRES = [
    "chat",
    "code",
    "dialogue",
    "encyclopedia",
    "languages",
    "letters",
    "mathematics",
    "prose",
    "tables",
]


def test_builtin_has_every_genre_and_enough_text() -> None:
    genres = load_genres()
    assert list(genres) == GENRES
    for name, documents in genres.items():
        assert sum(len(d.encode()) for d in documents) > 6_000, name
    assert sum(len(d.encode()) for d in load_documents("builtin")) > 120_000


def test_builtin_documents_are_whole_and_distinct() -> None:
    documents = load_documents("builtin")
    assert sorted(documents) == sorted(d for genre in load_genres().values() for d in genre)
    assert len(set(documents)) == len(documents) > 90
    assert all(len(d) > 200 and "<|" not in d for d in documents)


def test_builtin_order_is_fixed_and_every_prefix_is_mixed() -> None:
    documents = load_documents("builtin")
    assert documents == load_documents("builtin")
    home = {d: name for name, genre in load_genres().items() for d in genre}
    order = [home[d] for d in documents]
    assert order[: len(GENRES)] == GENRES
    for name in GENRES:
        places = [-1, *(i for i, genre in enumerate(order) if genre == name), len(order)]
        widest = max(b - a for a, b in pairwise(places))
        assert widest <= 2 * len(order) / order.count(name) + 1, name


def test_builtin_english_does_not_repeat_itself() -> None:
    shingles = [
        tuple(words[i : i + 8])
        for name, documents in load_genres().items()
        if name != "languages"
        for words in (re.findall(r"\w+", d.lower()) for d in documents)
        for i in range(len(words) - 7)
    ]
    assert len(shingles) > 15_000
    assert len(set(shingles)) / len(shingles) > 0.99


@pytest.mark.parametrize(
    "script",
    ["一-鿿", "぀-ヿ", "Ѐ-ӿ", "؀-ۿ", "ऀ-ॿ", "가-힣"],
    ids=["han", "kana", "cyrillic", "arabic", "hindi", "korean"],
)
def test_builtin_holds_other_scripts(script: str) -> None:
    text = "".join(load_genres()["languages"])
    assert len(re.findall(f"[{script}]", text)) > 400
