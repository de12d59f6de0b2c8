"""What a model says of itself in the words of the hub's model cards: licence, language, task, repository.

It comes from files of unknown origin and goes into a page, so a value of another form than usual is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files.untrusted import parse_yaml, read_text
from .companions import model_files

CARD = "README.md"
_LINK = r"https?://[^\s<>()\"'`]{1,300}|[\w][\w./-]{0,200}"
FORMS = {
    "license": r"[\w.+-]{1,80}",
    "license_name": r"[\w .+-]{1,100}",
    "license_link": _LINK,
    "language": r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*",
    "pipeline_tag": r"[a-z0-9-]{1,60}",
    "repository": r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}",
    "base_model": r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}",
}
# How a licence's own text begins, and the hub's name of it.
TEXTS = (
    (r"apache license,? version 2\.0", "apache-2.0"),
    (r"(the )?mit license", "mit"),
    (r"bsd 3-clause license", "bsd-3-clause"),
    (r"gnu general public license version 3", "gpl-3.0"),
)
BEGINNING = 300  # characters of a licence in which its name is looked for
OF_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/")
FIELDS = {
    "license": "general.license", "license_name": "general.license.name", "license_link": "general.license.link",
    "language": "general.languages",
}  # fmt: skip
ORIGINS = ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url", "general.repo_url")


def facts_of_folder(folder: Path) -> dict[str, Any]:
    """Return the facts of a model folder: of its card's front matter, and of the licence beside it."""
    facts = _checked(_front_matter(folder / CARD))
    facts.pop("repository", None)
    return facts if "license" in facts else {**facts, **_of_licence(folder)}


def facts_of_fields(read: Callable[[str], list[Any]]) -> dict[str, Any]:
    """Return the facts of a GGUF file. read: the values of a metadata field by its name, [] where there is none."""
    found = {key: read(field) for key, field in FIELDS.items()}
    plain = {key: values if key == "language" else values[0] for key, values in found.items() if values}
    origin = next((str(values[0]) for field in ORIGINS if (values := read(field))), "")
    return _checked({**plain, "repository": OF_HUB.sub("", origin)})


def _front_matter(file: Path) -> dict[str, Any]:
    """Return the YAML between the first two lines of dashes; empty where there is none that can be read."""
    try:
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", read_text(file), re.DOTALL)
        content = parse_yaml(found[1]) if found else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """Return the facts among these entries that have their usual form; of a list the items that have it."""
    facts: dict[str, Any] = {}
    for key, form in FORMS.items():
        value = content.get(key)
        if isinstance(value, list) and key in ("license", "language"):
            value = [item for item in value if _has_form(item, form)]
        elif not _has_form(value, form):
            value = None
        if value:
            facts[key] = value
    return facts


def _has_form(value: Any, form: str) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(form, value))


def _of_licence(folder: Path) -> dict[str, Any]:
    """Return the name of the licence whose text is in the folder; "other", with a link to it, for one not known."""
    files = [file for file in model_files(folder) if re.match(r"licen[cs]e", file.name, re.IGNORECASE)]
    if not files:
        return {}
    try:
        beginning = " ".join(read_text(files[0]).lower().split())[:BEGINNING]
    except (OSError, ValueError):
        beginning = ""
    known = next((name for text, name in TEXTS if re.search(text, beginning)), None)
    return {"license": known} if known else _checked({"license": "other", "license_link": files[0].name})
