"""The door `quantc.load`: transformers builds the model, and is handed the very tensors that were checked.

It opens no weight file itself, so that none can be swapped between the check and the load.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import _get_model_class

from ..checkpoint.config import METHOD
from ..checkpoint.reader import CheckpointReader, read_json
from ..errors import CheckpointError, in_one_sentence
from ..frontend.auto import asking_in_words, auto_class, first_line, needs_code
from ..frontend.bounds import layer_counts
from ..frontend.source import PathLike, quiet_transformers
from ..machine.compute_dtype import choose_dtype, name_of
from ..progress import Progress
from .half_weights import keep_half
from .model_check import handing_over

GENERATION = "generation_config.json"
log = logging.getLogger(__name__)


def read_model(
    reader: CheckpointReader, dtype: torch.dtype | None, verify: bool = False, trusted: bool = False
) -> PreTrainedModel:
    """Return the model of a checkpoint, on the CPU.

    dtype: of activations and of what is not packed; None is the config's. verify: compare every tensor with its
    checksum; the memory that was compared is what the model gets. trusted: whether code that the checkpoint brings may
    be run. Raises CheckpointError that names the tensor for one that is missing, changed or of no use, and for a config
    that transformers cannot build.
    """
    tensors = dict(reader.verified()) if verify else reader.slices()
    with quiet_transformers(), handing_over(reader), in_one_sentence(partial(_cannot_be_built, reader.folder)):
        model_class, config = _class_of(_read_config(reader, trusted), reader.folder, trusted)
        model = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype or config.dtype or torch.float32,
            generation_config=_read_generation_config(reader.folder),
        )
    if getattr(model, "quantization_method", None) != METHOD:
        raise CheckpointError(f"{reader.folder}: transformers did not load it as a quantc checkpoint; copy it again.")
    if not verify:
        reader.check_unchanged()
    model.name_or_path = model.config.name_or_path = str(reader.folder)
    return model


def choose_for(reader: CheckpointReader, device: torch.device) -> torch.dtype:
    """Return the dtype to compute a checkpoint in on a device, and log why it is not the checkpoint's own."""
    chosen = choose_dtype(stored_dtype(reader.config), device, unpacked_values(reader))
    if chosen.why:
        log.log(logging.WARNING if chosen.short else logging.INFO, "%s: computed in %s, as %s", reader.folder,
                name_of(chosen.dtype), chosen.why)  # fmt: skip
    return chosen.dtype


def stored_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that a config.json names for the weights that stayed floats; float32 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def unpacked_values(reader: CheckpointReader) -> int:
    """Return how many floats of a checkpoint are not packed: they take more memory in a wider dtype."""
    packed = {f"{name}.{part}" for name, entry in reader.entries.items() for part in entry.layout()}
    shapes = [stored.get_shape() for name, stored in reader.slices().items() if name not in packed]
    return sum(map(math.prod, shapes))


def _read_config(reader: CheckpointReader, trusted: bool) -> PreTrainedConfig:
    """Return the config as transformers reads it, once it is sure that the file is still the one that was checked."""
    _check_layers(reader)
    with asking_in_words(reader.folder):
        config = AutoConfig.from_pretrained(reader.folder, trust_remote_code=trusted)
    if read_json(reader.folder / "config.json") != reader.config:
        raise CheckpointError(f"{reader.folder / 'config.json'} changed while it was read; load it again.")
    return config


def _class_of(config: PreTrainedConfig, folder: Path, trusted: bool) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class that transformers would take, and the config it gets: some take the one of their text model."""
    auto = auto_class(config)
    mapping = auto._model_mapping
    own_code = getattr(config, "auto_map", {}).get(auto.__name__)
    if own_code is not None and trusted:
        return get_class_from_dynamic_module(own_code, folder), config
    if own_code is not None and type(config) not in mapping:
        raise needs_code(folder)
    if type(config) not in mapping:
        raise CheckpointError(
            f"{auto.__name__} knows no model for {type(config).__name__}; install the transformers that wrote the "
            "checkpoint."
        )
    model_class, text = _get_model_class(config, mapping), config.sub_configs.get("text_config")
    if text is not None and getattr(model_class, "config_class", None) == text:
        whole, config = config, config.get_text_config()
        config.quantization_config = whole.quantization_config
    return model_class, config


def _check_layers(reader: CheckpointReader) -> None:
    """Raise CheckpointError for more layers than the files can hold: a skeleton of 100,000 would take an hour."""
    for name, layers in layer_counts(reader.config):
        if isinstance(layers, int) and layers > len(reader.weight_map):
            raise CheckpointError(
                f"{reader.folder / 'config.json'} has {name} {layers}, but the files hold "
                f"{len(reader.weight_map)} tensors; the two do not belong together."
            )


def _read_generation_config(folder: Path) -> GenerationConfig:
    if (folder / GENERATION).is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _cannot_be_built(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: transformers cannot build the model that config.json describes ({first_line(error)}); a "
        "config.json that belongs to these weights is needed, so copy it again."
    )


def load(
    path: PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    verify: bool = False,
    compile: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a packed checkpoint as a transformers model that runs on packed weights.

    dtype: of activations and of what is not quantized; None is the model's own, or float32 where the CPU has no
    products of it (compute_dtype.py). verify: also check every checksum.
    compile: let `generate` compile the step that makes a token; its first call takes most of a minute, and tells
    `progress` how far it is (None: log lines). trust_remote_code: run Python code that the checkpoint brings.
    Raises CheckpointError that names the tensor or file for a truncated, missing, changed or unknown one.
    """
    reader, place = CheckpointReader(path), torch.device(device)
    model = read_model(reader, dtype or choose_for(reader, place), verify, trust_remote_code)
    if place.type == "cpu" and not compile:  # a compiler sees every panel as operations of its own
        keep_half(model, stored_dtype(reader.config))
    model.eval().to(place)
    if compile:
        from .compiled import compile_decoding

        compile_decoding(model, progress)
    return model
