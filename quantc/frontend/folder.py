"""A transformers folder with safetensors weights, sharded or not, opened lazily.

Checkpoint names need not be the model's (transformers 5 merges experts, renames prefixes, splits fused
tensors). Its own conversion runs on just the tensors asked for, so a block costs a block.
"""

from __future__ import annotations

from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import ModelError
from ..untrusted import read_json
from .source import (
    COMPUTE_DTYPE,
    Source,
    auto_class,
    build_skeleton,
    first_line,
    is_under,
    quiet_transformers,
    read_tokenizer,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# transformers 5.10 still takes the tensor-parallel plan here; later ones keep it on the model.
OLDER_ARGUMENTS = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class FolderSource(Source):
    """A model folder; raises ModelError when it is incomplete, pickled, or quantized already."""

    def __init__(self, folder: Path, name: str | None = None):
        self.path = folder
        self.name = name or folder.resolve().name
        self._files = _weight_files(folder)
        self.model = build_skeleton(_read_config(folder))
        self._conversions: list[Any] = list(get_model_conversion_mapping(self.model))

    @cached_property
    def _headers(self) -> dict[str, tuple[Path, torch.dtype]]:
        """Checkpoint tensor name -> the shard that holds it, and its dtype there."""
        headers = {}
        for file in self._files:
            shard = _open_shard(file)
            for key in shard.keys():  # noqa: SIM118  a safe_open is no mapping
                dtype = DTYPES.get(shard.get_slice(key).get_dtype(), COMPUTE_DTYPE)
                headers[key] = file, dtype
        return headers

    @cached_property
    def _targets(self) -> dict[str, str]:
        """Checkpoint tensor name -> name of the (first) model tensor it becomes."""
        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        known = self.model.state_dict()
        prefix = self.model.base_model_prefix
        targets = {}
        for key in self._headers:
            target, _ = rename_source_key(key, renamings, converters, prefix, known)
            if target not in known and key in known:
                target, _ = rename_source_key(key, [], [], prefix, known)
            targets[key] = target
        return targets

    def load(self, prefix: str) -> None:
        wanted = self.wanted_under(prefix)
        keys = [key for key, target in self._targets.items() if is_under(target, prefix) or target in wanted]
        # Opened anew each time: pages of a mapped shard count as this process's memory until it is closed.
        shards = {file: _open_shard(file) for file in {self._headers[key][0] for key in keys}}
        slices = {key: shards[self._headers[key][0]].get_slice(key) for key in keys}
        settings = LoadStateDictConfig(dtype=COMPUTE_DTYPE, weight_mapping=self._conversions)
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings, **OLDER_ARGUMENTS)
        for name, found, needed in sorted(info.mismatched_keys):
            raise ModelError(
                f"{self.path}: {name} has the shape {tuple(found)}, but config.json describes {tuple(needed)}; "
                "a config that belongs to the weights is needed."
            )
        self.share_tied(prefix)
        self.check_loaded(prefix)

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {target: self._headers[key][1] for key, target in self._targets.items()}

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._dtypes.get(name, COMPUTE_DTYPE)

    def weight_files(self) -> list[Path]:
        return self._files

    def load_whole(self, dtype: torch.dtype | None) -> PreTrainedModel:
        with quiet_transformers():
            return auto_class(self.model.config).from_pretrained(self.path, dtype=dtype or "auto").eval()

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.path)


def _open_shard(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is not a readable safetensors file ({error}); fetch or save that shard again."
        ) from error


def _read_config(folder: Path) -> object:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder}: config.json is not one that transformers can use ({first_line(error)}); "
            "a decoder model that AutoModelForCausalLM knows is needed."
        ) from error
    method = _quantization_method(config)
    if method is not None:
        remedy = (
            "it needs no second quantization: evaluate or load it as it is"
            if method == "quantc"
            else "start from the original, unquantized model"
        )
        raise ModelError(f"{folder} is already quantized (by {method}), but quantc needs float weights; {remedy}.")
    return config


def _quantization_method(config: object) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed tool")


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json; a transformers model folder (config.json, tokenizer, "
            "safetensors weights) or a .gguf file is needed."
        )
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles:
        raise ModelError(
            f"{folder} has only pickled weights ({pickles[0]}), which quantc does not unpickle; safetensors are "
            "needed: load the model with transformers and call save_pretrained, then use that folder."
        )
    raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}; safetensors weights are needed, so fetch or save them.")


def _indexed_files(folder: Path) -> list[Path]:
    try:
        weight_map = read_json(folder / INDEX)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} is not a readable index ({error}); fetch or save it again.") from error
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: the shard {name} that {INDEX} lists is missing; all {len(names)} shards are needed, "
                "so fetch that file."
            )
    return [folder / name for name in names]
