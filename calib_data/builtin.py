"""The text that comes with quantc."""

from __future__ import annotations

from importlib.resources import files

from .sources import split_documents


def load_builtin() -> list[str]:
    """Return all built-in documents, interleaved: any prefix holds the genres in about their overall shares."""
    placed = [
        (i / len(documents), genre, document)
        for genre, documents in load_genres().items()
        for i, document in enumerate(documents)
    ]
    return [document for _, _, document in sorted(placed)]


def load_genres() -> dict[str, list[str]]:
    """Return genre (the file name without its ending) -> its documents in file order; genres sorted by name."""
    texts = [entry for entry in (files(__package__) / "text").iterdir() if entry.name.endswith(".txt")]
    return {
        entry.name.removesuffix(".txt"): split_documents(entry.read_text(encoding="utf-8"))
        for entry in sorted(texts, key=lambda entry: entry.name)
    }
