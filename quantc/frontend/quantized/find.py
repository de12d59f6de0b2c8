"""Which container a model folder is in, by its config.json or by the files that older tools wrote beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...files.untrusted import read_json
from .base import CONTAINERS, Container
from .settings import Settings

KEYS = ("quantization_config", "compression_config")
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
OWN = "quantc"


def find_container(folder: Path, config: Any) -> Container | None:
    """Return what reads the weights of a folder, None where they are floats.

    The config no longer says that it is quantized: of a model made from it that would be wrong. Raises ModelError for
    what cannot be read.
    """
    content = _take(config)
    if content is None:
        return _from_older_files(folder)
    method = content.get("quant_method")
    name = str(getattr(method, "value", method) or "an unnamed tool")
    if name == OWN:
        raise ModelError(
            f"{folder} is already quantized (by {OWN}), but quantc needs float weights; it needs no second "
            "quantization: evaluate or load it as it is."
        )
    if name not in CONTAINERS:
        raise ModelError(
            f"{folder} is already quantized (by {name}), but quantc reads only {', '.join(CONTAINERS)} and float "
            "weights; start from the original, unquantized model."
        )
    return CONTAINERS[name](Settings(folder, content))


def _take(config: Any) -> dict[str, Any] | None:
    """Take the settings away from a config and its parts, and return them."""
    found = None
    for part in (config, config.get_text_config()):
        for key in KEYS:
            taken = part.__dict__.pop(key, None)
            found = found or taken
    if found is None or isinstance(found, Mapping):
        return None if found is None else dict(found)
    return dict(found.to_dict())


def _from_older_files(folder: Path) -> Container | None:
    for file, method in OLDER_FILES.items():
        path = folder / file
        if path.is_file():
            try:
                content = read_json(path)
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} is not readable ({error}); fetch it again.") from error
            if not isinstance(content, dict):
                raise ModelError(f"{path} is no mapping of settings; fetch it again.")
            return CONTAINERS[method](Settings(folder, content, file))
    return None
