"""Compares a checkpoint's small files with what its manifest recorded, and finds files that would be read instead of
them.

transformers opens whatever it finds, in its own order: one file more in the folder, or one key more in config.json, and
it runs weights that nobody checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CONFIG = "config.json"
METHOD = "quantc"  # quant_method of its quantization_config
FIRST_CHOICE = "model.safetensors"  # transformers opens it wherever it is there, whatever the index says
WEIGHTS_KEY = "transformers_weights"  # of config.json: the file that transformers opens before that one
# What config.json has there, which is no file. transformers without quantc only warns of an unknown method, and draws
# the weights at random; but it refuses this name, and shows it. With quantc, runtime/hf.py takes it out of the way.
REMEDY = "these weights are packed by quantc: install it, and `import quantc` before the model is loaded"
ADAPTER = "adapter_config.json"
# Written anew by save_pretrained, and nothing is computed from them.
PROVENANCE = ("_name_or_path", "transformers_version")
# They change without changing the model: people edit the card, and a report is written again after the weights.
UNRECORDED = ("README.md", "report.json", "report.html")
OTHER_CONFIG = ("configuration_files",)  # names a file that transformers reads instead of config.json
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
OTHER_METHOD = ("load_in_8bit", "load_in_4bit")  # transformers believes them before it looks at quant_method


def checksum_of_config(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a config's content, without the keys that only say who wrote it.

    The content is JSON with sorted keys, no spaces and ASCII only, so it does not depend on how a file spells it.
    """
    content = _without_provenance(json.loads(json.dumps(config)))
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def record(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return file name -> sha256 of config.json's content and of every other small file a checkpoint has so far."""
    found = {file.name: _checksum_of_file(file) for file in _companions(folder)}
    return {CONFIG: checksum_of_config(config), **found}


def recorded(manifest: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Return the table of `record` from a manifest, empty for one of before there was one; file: the manifest's.

    Raises CheckpointError for a table that cannot be read.
    """
    table = manifest.get("files", {})
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise CheckpointError(f"{file} has no readable table of files; copy it again.")
    return table


def demand_quantc(config: dict[str, Any]) -> None:
    """Make transformers without quantc refuse the checkpoint of a config, and its text model, with the remedy."""
    refuse_transformers(config, REMEDY)


def refuse_transformers(config: dict[str, Any], why: str) -> None:
    """Make transformers refuse the weights of a config, and of its text model, and show why: a sentence, no file."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part[WEIGHTS_KEY] = why


def check_config(folder: Path, config: Mapping[str, Any], known: Mapping[str, str], manifest: str) -> None:
    """Raise CheckpointError where a config is not the one that the manifest recorded."""
    if CONFIG in known and checksum_of_config(config) != known[CONFIG]:
        raise CheckpointError(
            f"{folder / CONFIG} has changed since it was written (its checksum in {manifest} differs), so the model "
            f"would compute something else; copy it again, or, if the change is wanted, delete its line in {manifest}."
        )


def compare(folder: Path, known: Mapping[str, str], manifest: str) -> list[str]:
    """Return a sentence for each small file that is new, gone or changed, or that the manifest knows nothing of."""
    if not known:
        return [f"{manifest} has no checksums of {CONFIG} and the tokenizer, so they were not checked"]
    present = {file.name: file for file in _companions(folder)}
    shown = {name: "".join(c if c.isprintable() else "?" for c in name) for name in (*known, *present)}
    notes = [] if CONFIG in known else [f"{manifest} has no checksum of {CONFIG}, so it was not checked"]
    for name in sorted({*known, *present} - {CONFIG}):
        if name not in present:
            notes.append(f"{shown[name]} is missing")
        elif name not in known:
            notes.append(f"{shown[name]} was added")
        elif _checksum_of_file(present[name]) != known[name]:
            notes.append(f"{shown[name]} has changed")
    return notes


def check_nothing_else_is_read(folder: Path, config: Mapping[str, Any], shards: set[str], index: str) -> None:
    """Raise CheckpointError that names what would make transformers read other files than the shards.

    index: the name of the index that lists them; the only shard may also be opened without one.
    """
    chosen = config.get(WEIGHTS_KEY)
    if chosen not in (None, REMEDY, index) and {chosen} != shards:
        raise CheckpointError(
            f"{folder / CONFIG} names {chosen!r} as {WEIGHTS_KEY}, but the checkpoint's weights are in "
            f"{', '.join(sorted(shards))}; copy it again."
        )
    if (folder / FIRST_CHOICE).is_file() and shards != {FIRST_CHOICE}:
        raise CheckpointError(
            f"{folder / FIRST_CHOICE} is not part of the checkpoint, but transformers would load it instead of the "
            f"files that {index} lists; move it away."
        )
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER} is not part of the checkpoint, but transformers would load the adapter on top of it; "
            "move it away and load the adapter by itself."
        )
    _check_keys(folder, config)


def _check_keys(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a key that leads transformers to another config or another method."""
    settings = config.get("quantization_config")
    strange = [key for key in OTHER_CONFIG if key in config]
    strange += [key for key in OTHER_METHOD if isinstance(settings, dict) and key in settings]
    if strange:
        raise CheckpointError(
            f"{folder / CONFIG} has the key {strange[0]}, which makes transformers read something else than was "
            "checked; copy it again."
        )
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    fetched = [(key, str(part[key])) for part in parts for key in KERNELS if "/" in str(part.get(key))]
    if fetched:
        key, value = fetched[0]
        raise CheckpointError(
            f"{folder / CONFIG} has the {key} {value[:80]!r}, which makes transformers fetch code from the hub; delete "
            "that key, and pass it to from_pretrained if it is wanted."
        )


def facts_of(file: Path) -> tuple[int, ...] | None:
    """Return what tells a file from another in its place, and from itself once it is written to; None if it is gone."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _companions(folder: Path) -> list[Path]:
    """Return the small files beside the weights that say what a tokenizer, a template or a plan is."""
    names = (*UNRECORDED, CONFIG)
    found = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(file for file in found if file.name not in names and not _is_of_weights(file.name))


def _is_of_weights(name: str) -> bool:
    """Return whether a file belongs to the weights, which have checksums of their own, or to an unfinished run."""
    endings = (".safetensors", ".safetensors.index.json", ".data")
    return name.endswith(endings) or name in ("quantc.json", "quantc-run.json", "resume.json")


def _checksum_of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_provenance(item) for key, item in value.items() if key not in PROVENANCE}
    return [_without_provenance(item) for item in value] if isinstance(value, list) else value
