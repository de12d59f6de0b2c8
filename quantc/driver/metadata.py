"""The files of a checkpoint beside its weights: config, manifest, tokenizer, plan, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import integrity
from ..checkpoint.config import PackedEntry, describe_quantization
from ..checkpoint.shards import writing
from ..checkpoint.writer import CheckpointWriter
from ..frontend import Source
from ..frontend.companions import model_files, notes_on_left, tokenizer_files
from ..pipeline import fingerprint
from ..pipeline.run import Run
from ..planning.sizes import notes_on_size
from ..spec import QuantSpec
from .model_card import CARD_FILE, model_card

PLAN_FILE = "plan.yaml"


def _packed_entries(run: Run) -> dict[str, PackedEntry]:
    entries = {}
    for name, spec in run.plan.specs.items():
        if spec is None:
            continue
        linear = run.graph.linears.get(name)
        if linear is None:
            n, k = run.source.model.get_parameter(name).shape
            entries[name] = PackedEntry(spec.as_stored(), (n, k))
        else:
            stacked = linear.kind == "stack"
            leading = (linear.experts,) if stacked else ()
            transposed = stacked and linear.transposed
            entries[name] = PackedEntry(spec.as_stored(), linear.shape, leading, transposed)
    return entries


def config_json(run: Run) -> dict[str, Any]:
    """Return the content of config.json: the source model's, and how its weights are packed."""
    entries = _packed_entries(run)
    specs = [entry.spec for entry in entries.values()]
    default = max(specs, key=specs.count) if specs else QuantSpec()
    config = run.source.model.config.to_dict()
    config["architectures"] = [type(run.source.model).__name__]
    config["dtype"] = str(run.source.dtype).removeprefix("torch.")
    config["quantization_config"] = describe_quantization(entries, default, run.residual)
    integrity.demand_quantc(config)
    return config


def finish_weights(run: Run, writer: CheckpointWriter, started: tuple[float, float]) -> None:
    """Write the weight files and the report. started: wall and CPU seconds, see `Report.count_costs`."""
    report = run.report
    report.weights_bytes = writer.finish_weights(run.progress)
    if run.container is not None:
        report.weights_bytes = run.container.file_bytes(run.plan.specs, writer.dtypes())
    report.source_bytes = sum(file.stat().st_size for file in run.source.weight_files())
    report.notes += notes_on_size(run)
    report.count_costs(*started)
    with writing(writer.folder):
        report.write(writer.folder)


def write_metadata(
    run: Run, recipe: dict[str, Any], tokens: torch.Tensor | None, writer: CheckpointWriter
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the model card, and return what config.json and quantc.json will hold; the weight files are finished."""
    write_card(run, recipe, writer)
    config = config_json(run)
    with run.source.unchanged:
        return config, manifest_json(run, recipe, tokens, writer.folder, config)


def manifest_json(
    run: Run, recipe: dict[str, Any], tokens: torch.Tensor | None, folder: Path, config: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of quantc.json: what the checkpoint was made from, and checksums of its small files.

    recipe: its `to_dict`. folder: where those were written. config: what config.json will hold.
    """
    return {
        "format": "quantc",
        "version": 1,
        "source": {
            "name": run.source.name,
            "files": fingerprint.of_weight_files(run.source),
            "trust_remote_code": run.source.trusted,
        },
        "recipe": recipe,
        "calibration": run.report.calibration,
        "calibration_sha256": fingerprint.of_tokens(tokens),
        "libraries": fingerprint.of_libraries(),
        "files": integrity.record(folder, config),
    }


def write_companions(run: Run, writer: CheckpointWriter) -> None:
    """Write what makes the folder a model besides its weights: tokenizer, templates, settings, code, licences."""
    writer.add_files(lambda folder: _write_companions(run.source, folder))
    run.report.notes += notes_on_left(run.source.path, run.source.optional_tokenizer is not None)


def _write_companions(source: Source, folder: Path) -> None:
    """Write the tokenizer as it was read, then copy what that has not written."""
    tokenizer = source.optional_tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in tokenizer_files(source.path, saved=tokenizer is not None):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    for file in [*model_files(source.path), *source.code_files]:
        place = folder / file.relative_to(source.path)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def write_card(run: Run, recipe: dict[str, Any], writer: CheckpointWriter) -> None:
    """Write README.md, once the weight files and the report are finished."""
    card = model_card(run.source, list(run.plan.specs.values()), run.report, recipe, writer.folder)
    writer.add_text(CARD_FILE, card)
