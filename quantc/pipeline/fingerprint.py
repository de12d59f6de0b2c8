"""What results depend on, a function for each fact: resumed runs, results kept on disk and manifests are told by these.

Values are JSON values, named so that a message can show the one in which two runs differ.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from ..frontend import Source
from ..frontend.unchanged import written_at
from ..machine.compute_dtype import has_fast_bfloat16
from ..version import __version__
from .run import Run

SHORT = 16  # hexadecimal digits that tell two of a kind apart


def of_model(source: Source) -> dict[str, Any]:
    """Return what the weights and the code of a model are.

    A file that was written again is another one, though what is compared of its contents may be the same.
    """
    return {
        "file": {file.name: _version_of(file) for file in source.weight_files()},
        "contents of": source.contents(),
        "config": digest([source.model.config.to_json_string().encode()])[:SHORT],
        "trust_remote_code": source.trusted,
    }


def of_weight_files(source: Source) -> dict[str, str]:
    """Return the sha256 of every weight file, by its name: minutes of reading, for a record that stays."""
    return {file.name: _file_digest(file) for file in source.weight_files()}


def of_tokens(tokens: torch.Tensor | None) -> str | None:
    """Return the sha256 of a calibration set (samples, T), None where there is none."""
    return None if tokens is None else digest([tokens.numpy().tobytes()])


def of_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of every pass of a recipe (`Recipe.to_dict`), and of its calibration.

    A pass that the recipe has again gets a mark after its name.
    """
    settings: dict[str, Any] = {}
    for item in recipe["passes"]:
        for name, config in item.items():
            while name in settings:
                name += "'"
            settings[name] = config
    names = [name for item in recipe["passes"] for name in item]
    return {"passes": ", ".join(names), "calibration": recipe["calibration"], **settings}


def of_device(device: torch.device) -> str:
    """Return what decides the numbers of a product on a device, besides the number of threads."""
    if device.type == "cuda":
        return f"{device.type} {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.backends.cpu.get_cpu_capability()}{', bfloat16' * has_fast_bfloat16(device)}"


def of_libraries() -> dict[str, str]:
    """Return versions of what the result may depend on."""
    return {
        "quantc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def key_of(run: Run, tokens: torch.Tensor, **question: Any) -> str:
    """Return the key under which the answer to a question about a run is kept on disk.

    It is the same for the same model, rounding and tokens. question: what else the answer depends on.
    """
    facts = {
        **of_model(run.source),
        "tokens": of_tokens(tokens),
        "rounding": run.rounding.settings(),
        "device": of_device(run.device),
        **question,
    }
    return digest([json.dumps(facts, sort_keys=True).encode()])


def digest(parts: Iterable[bytes]) -> str:
    """Return the sha256 of these bytes, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _version_of(file: Path) -> str:
    facts = file.stat()
    return f"{facts.st_size} bytes, written {written_at(facts.st_mtime_ns)}"


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
