"""README.md of an exported folder: what it is, who loads it and how; licence and origin are the checkpoint's."""

from __future__ import annotations

from pathlib import Path

from ...driver.model_card import FOLDER, front_matter, licence_note
from ...frontend.facts import facts_of_folder
from ...units import listed

CARD = """
# {name}, for {target}

Packed by quantc: the same values as in a quantc checkpoint of {bits:.2f} bits per weight in the linears of the blocks.

| format | layers |
|---|---|
{formats}

## How to load it

quantc is not needed. Read by: {readers}.
{loading}
## Licence

{licence}
"""
IN_PYTHON = """    pip install {install}

```python
{imports}

model = {model}("{folder}"{dtype})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""
BY_TRANSFORMERS = {
    "imports": "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "model": "AutoModelForCausalLM.from_pretrained", "folder": FOLDER, "dtype": ', dtype="auto"',
}  # fmt: skip
BY_GPTQMODEL = {
    "imports": "from gptqmodel import GPTQModel\nfrom transformers import AutoTokenizer",
    "model": "GPTQModel.load", "folder": FOLDER, "dtype": "",
}  # fmt: skip
# How readers load a folder. The first of them that loads the model is shown, or the one that the target is for.
LOADING = {
    "transformers with compressed-tensors": IN_PYTHON.format(
        install="transformers accelerate compressed-tensors", **BY_TRANSFORMERS
    ),
    "transformers with auto-round": IN_PYTHON.format(install="auto-round", **BY_TRANSFORMERS),
    "GPTQModel": IN_PYTHON.format(install="gptqmodel", **BY_GPTQMODEL),
    "vLLM": f"    pip install vllm\n    vllm serve {FOLDER}",
    "mlx-lm": f'    pip install mlx-lm\n    mlx_lm.generate --model {FOLDER} --prompt "Once upon a time"',
}
MEANT_FOR = {"vllm": "vLLM", "vllm-rotated": "vLLM"}

# Names that the hub has for libraries: the first that loads a folder goes into its card.
LIBRARIES = {"transformers": "transformers", "mlx-lm": "mlx", "vLLM": "vllm"}
UNTRIED = "none that was tried"


def folder_card(
    checkpoint: Path, target: str, readers: list[str], bits: float, schemes: dict[str, int], folder: Path
) -> str:
    """Return the text of the card. schemes: label -> layers stored so. folder: where the other files are."""
    facts = facts_of_folder(checkpoint)
    repository = facts.get("base_model", "")
    rows = sorted(schemes.items(), key=lambda item: (-item[1], item[0]))
    return front_matter(facts, repository, ["quantc", target], folder, _library_of(readers)) + CARD.format(
        name=repository or checkpoint.resolve().name,
        target=target,
        bits=bits,
        formats="\n".join(f"| `{label}` | {count:,} |" for label, count in rows),
        readers=listed(readers or [UNTRIED]),
        loading=_lines_for(target, readers),
        licence=licence_note(facts, repository),
    )


def _lines_for(target: str, readers: list[str]) -> str:
    """Return how one of the readers loads the folder, between line breaks; "" where none of them is known."""
    known = [name for name in LOADING if any(reader.startswith(name) for reader in readers)]
    meant = [name for name in known if name == MEANT_FOR.get(target)]
    return f"\n{LOADING[(meant or known)[0]]}\n" if known else ""


def _library_of(readers: list[str]) -> str | None:
    """Return what the hub is to show as the library that loads the folder; None where it knows none of them."""
    found = (library for name, library in LIBRARIES.items() for reader in readers if reader.startswith(name))
    return next(found, None)
