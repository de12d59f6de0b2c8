"""README.md of a checkpoint: what it is, how it is loaded, and what it lost.

Its front matter is what the hub reads. Names and licences come from the source's files: what goes into the page was
checked for its form (frontend/facts.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from ..frontend.source import Source
from ..planning.targets import RUNTIMES
from ..report import Report
from ..spec import QuantSpec
from ..units import ratio, size

CARD_FILE = "README.md"
HUB = "https://huggingface.co"
HUB_CACHE = "models--"  # begins the folder that the hub's cache has for owner--name
CARRIED = ("language", "license", "license_name", "license_link", "pipeline_tag")
FOLDER = "path/to/this/folder"

CARD = """
# {name}, quantized with quantc

{bits:.2f} bits per weight in the linears of the blocks, {total} of weight files{share}. `plan.yaml` says how
each weight is stored, `report.json` what that cost, and `quantc.json` where they come from.

{formats}

Calibration text: {calibration}.

## What it loses

{loss}

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

quantc must be installed, which teaches transformers this format. Without it transformers refuses the weights.
`quantc verify {folder}` checks the files.

`quantc.load("{folder}")` returns the same model, checked before it is built.

{llama_cpp}

## Recipe

```yaml
{recipe}
```

## Licence

{licence}
"""
NOT_MEASURED = (
    f"It was not measured when it was made. `quantc eval {FOLDER} --against ORIGINAL --text FILE` measures perplexity\n"
    "and the KL divergence from the original."
)
OF_LLAMA_CPP = (
    f"These formats are llama.cpp's own: `quantc export {FOLDER} -o model.gguf` writes the same weights for it."
)
NOT_OF_LLAMA_CPP = (
    f"For llama.cpp, `quantc export {FOLDER} -o model.gguf` writes the same weights where a GGUF file can hold these\n"
    "formats, and names those that it cannot."
)


def model_card(
    source: Source, specs: list[QuantSpec | None], report: Report, recipe: dict[str, Any], folder: Path
) -> str:
    """Return the text of the card. specs: of every weight in the plan. folder: where the other files are."""
    facts = dict(source.facts)
    repository = hub_id(source.path) or facts.get("repository", "")
    codes = {spec.code for spec in specs if spec is not None}
    total = report.weights_bytes
    return front_matter(facts, repository, ["quantc"], folder) + CARD.format(
        name=repository or " ".join(source.name.split()),
        bits=report.bits_per_weight,
        total=size(total),
        share=f", {ratio(total, report.source_bytes)} of the original's size" if report.source_bytes else "",
        formats=_formats(specs),
        calibration=report.calibration or "none",
        loss=NOT_MEASURED,
        folder=FOLDER,
        llama_cpp=OF_LLAMA_CPP if codes and codes <= set(RUNTIMES["gguf"].codes) else NOT_OF_LLAMA_CPP,
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(),
        licence=licence_note(facts, repository),
    )


def note_measured(folder: Path, found: str) -> None:
    """Write what was measured into a checkpoint's card, where the card says that nothing was."""
    file = folder / CARD_FILE
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(NOT_MEASURED, f"Measured: {found}."), encoding="utf-8")


def hub_id(path: Path) -> str:
    """Return owner/name where a model was read from the hub's cache; else ""."""
    cached = (part for part in path.parts if part.startswith(HUB_CACHE))
    return next(cached, HUB_CACHE).removeprefix(HUB_CACHE).replace("--", "/")


def front_matter(
    facts: dict[str, Any], repository: str, tags: list[str], folder: Path, library: str | None = "transformers"
) -> str:
    """Return the front matter that the hub reads; a link to a licence that leads nowhere is mended in the facts.

    repository: owner/name of the original, or "". folder: where the files beside the card are. library: what loads it,
    if the hub knows that.
    """
    _complete_link(facts, repository, folder)
    content = {key: facts[key] for key in CARRIED if key in facts}
    content |= {**({"library_name": library} if library else {}), "tags": tags}
    if repository:
        content |= {"base_model": repository, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(content, allow_unicode=True)}---\n"


def _complete_link(facts: dict[str, Any], repository: str, folder: Path) -> None:
    """Let a link to a licence that is no file of this folder lead to the original's; without one it goes."""
    link = facts.get("license_link", "")
    if not link or link.startswith("http") or (folder / link).is_file():
        return
    del facts["license_link"]
    if repository:
        facts["license_link"] = f"{HUB}/{repository}/blob/main/{link}"


def _formats(specs: list[QuantSpec | None]) -> str:
    """Return a table of how many weights have which format."""
    counts = Counter("unquantized" if spec is None else spec.label() for spec in specs)
    rows = [
        f"| `{label}` | {count:,} |" for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    return "\n".join(["| format | weights |", "|---|---|", *rows])


def licence_note(facts: dict[str, Any], repository: str) -> str:
    """Return a sentence on the licence of the original."""
    found = facts.get("license")
    if found is None:
        return "The original's files name no licence; whatever holds for the original holds for this copy."
    name = facts.get("license_name") or (found if isinstance(found, str) else ", ".join(found))
    link = facts.get("license_link")
    shown = f"[{name}]({link})" if link else name
    return f"That of the original{f' [{repository}]({HUB}/{repository})' if repository else ''}: {shown}."
