"""README.md of a checkpoint: how to load it, and what that needs."""

from __future__ import annotations

from pathlib import Path

CARD_FILE = "README.md"
HUB_CACHE = "models--"  # begins the folder that the hub's cache has for owner--name

FRONT = """---
{base_model}library_name: transformers
tags:
- quantc
---
"""
CARD = """
# {name}, quantized with quantc

{bits:.2f} bits per weight in the linears of the blocks, {total} bytes of weight files. `plan.yaml` says how each weight
is stored, `report.json` what that cost, and `quantc.json` where they come from.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

quantc must be installed, which teaches transformers this format. Without it transformers refuses the weights.
`quantc verify path/to/this/folder` checks the files.
"""


def model_card(name: str, path: Path, bits: float, total: int) -> str:
    """Return the text of the card. name, path: the source's. bits: per weight. total: bytes of the weight files."""
    repository = _hub_id(path)
    front = FRONT.format(base_model=f"base_model: {repository}\n" if repository else "")
    plain = " ".join(name.split())
    return front + CARD.format(name=repository or plain, bits=bits, total=total)


def _hub_id(path: Path) -> str:
    """Return owner/name where a model was read from the hub's cache; else ""."""
    cached = (part for part in path.parts if part.startswith(HUB_CACHE))
    return next(cached, HUB_CACHE).removeprefix(HUB_CACHE).replace("--", "/")
