"""A transformers folder with safetensors weights, sharded or not, opened lazily.

Checkpoint names need not be the model's (transformers 5 merges experts, renames prefixes, splits fused
tensors). Its own conversion runs on just the tensors asked for, so a block costs a block.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..errors import ModelError
from ..machine.dtypes import DTYPES
from ..progress import Progress
from .agreement import OLDER_ARGUMENTS, check_agreement, differing_ties
from .auto import asking_in_words, auto_class, build_skeleton, first_line, read_tokenizer
from .bounds import check_config_file, check_sizes
from .checkpoint_names import CheckpointNames
from .companions import is_inside
from .facts import facts_of_folder
from .finite import check_finite
from .kinds import check_architecture, refuse_adapter, refuse_fetched_code, refuse_other_folders
from .quantized import QuantizedWeights, Stored, find_container, open_quantized
from .source import COMPUTE_DTYPE, Source, cast_parameter, is_under, quiet_transformers, set_parameter
from .unchanged import stored_tensors
from .weight_files import Header, find_weights


class FolderSource(Source):
    """A model folder; raises ModelError when it is incomplete, pickled, or quantized in a way that is not read.

    What transformers would load is compared with the files' headers here, before any weight is read. Weights that
    another tool has quantized are decoded as they are loaded.
    """

    def __init__(self, folder: Path, name: str | None = None, trusted: bool = False):
        self.path, self.trusted = folder, trusted
        self.name = name or _name_of(folder)
        refuse_other_folders(folder)
        config = _read_config(folder, trusted)
        self._container = find_container(folder, config)
        check_architecture(folder, config)
        if not trusted:
            refuse_fetched_code(folder, config)
        # Taken away, since it would point a checkpoint made from this folder to another file.
        self._weights = find_weights(folder, config.__dict__.pop("transformers_weights", None))
        refuse_adapter(folder)
        check_sizes(config, self._weights.files)
        self._build(config)
        self.notes = list(self._weights.notes)
        if hasattr(self.model.config, "auto_map"):
            self.notes.append("code that the model brings was run (--trust-remote-code)")
        self._believe_the_files()
        with quiet_transformers():
            self.notes += check_agreement(folder, self.model, self._conversions, self._targets, self._headers)
        if self.quantized is not None:
            self.notes += self.quantized.notes

    def _build(self, config: Any) -> None:
        self.model = build_skeleton(config, self.trusted)
        if not self.trusted and hasattr(self.model.config, "auto_map"):
            del self.model.config.auto_map  # transformers' own class is used, here and for a copy
        self._conversions: list[Any] = list(get_model_conversion_mapping(self.model))
        self._names = CheckpointNames(self.model, self._conversions)

    def _believe_the_files(self) -> None:
        """Untie a head that config.json calls tied where the files hold other values for it, as transformers does."""
        keys = {target: key for key, target in self._targets.items()}
        differing = differing_ties(self.model.all_tied_weights_keys, keys, self._headers)
        if not differing:
            return
        head = self.model.get_output_embeddings()
        for name in differing:
            if self.model.get_submodule(name.rpartition(".")[0]) is not head:
                raise ModelError(
                    f"{self.path}: {name} shares its values with {self.model.all_tied_weights_keys[name]} in this "
                    "model, but the files hold others; weights that belong to the config are needed."
                )
        config = self.model.config
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        self._build(config)
        del self._targets
        self.notes.append(
            f"config.json says that the head is the embedding, but {differing[0]} has values of its own; the files are "
            "believed, and the head is stored by itself"
        )

    @cached_property
    def _stored_headers(self) -> dict[str, Header]:
        return self._weights.headers()

    @cached_property
    def quantized(self) -> QuantizedWeights | None:
        """The weights as another tool has packed them, None where all are floats."""
        if self._container is None:
            return None
        stored = Stored(self.path, self._stored_headers, self._names.owner)
        return open_quantized(self._container, stored, self.model.config.dtype)

    @property
    def _headers(self) -> dict[str, Header]:
        return self._stored_headers if self.quantized is None else self.quantized.headers

    @cached_property
    def _targets(self) -> dict[str, str]:
        """Checkpoint tensor name -> name of the (first) model tensor it becomes; a shared one by its stored name."""
        return self._names.targets(self._headers)

    def load(self, prefix: str) -> None:
        wanted = self.wanted_under(prefix)
        keys = [key for key, target in self._targets.items() if is_under(target, prefix) or target in wanted]
        self._read(keys, LoadStateDictConfig(dtype=COMPUTE_DTYPE, weight_mapping=self._conversions))
        for name, stored in self.tied.items():
            if self.model.get_parameter(stored).is_meta and not self.model.get_parameter(name).is_meta:
                set_parameter(self.model, stored, self.model.get_parameter(name))
        self.share_tied(prefix)
        self.check_loaded(prefix)

    def _read(self, keys: list[str], settings: LoadStateDictConfig) -> None:
        """Give the model the tensors of these keys, in the dtypes that its own have."""
        with self.unchanged, quiet_transformers():
            slices = self._slices(keys)
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings, **OLDER_ARGUMENTS)
        if info.mismatched_keys or info.conversion_errors:
            raise ModelError(f"{self.path} has changed since its headers were read; start again.")

    def _slices(self, keys: list[str]) -> dict[str, Any]:
        if self.quantized is not None:
            return self.quantized.tensors(keys)
        shards = {file: stored_tensors(file) for file in {self._headers[key].file for key in keys}}
        return {key: shards[self._headers[key].file][key] for key in keys}

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        return {target: DTYPES.get(self._headers[key].dtype, COMPUTE_DTYPE) for key, target in self._targets.items()}

    def stored_dtype(self, name: str) -> torch.dtype:
        return self._dtypes.get(name, COMPUTE_DTYPE)

    def stored_bits(self, name: str) -> float:
        keys = [key for key, target in self._targets.items() if target == name] if self.quantized else []
        if not keys or self.quantized is None:
            return super().stored_bits(name)
        return sum(map(self.quantized.bits_of, keys)) / sum(prod(self._headers[key].shape) for key in keys)

    def weight_files(self) -> list[Path]:
        return self._weights.files

    def check_values(self, progress: Progress) -> None:
        known = {
            name for name, _ in self.model.named_parameters()
        }  # buffers may be infinite: bounds of what is clipped
        names = {key for key, target in self._targets.items() if target in known}
        if self.quantized is not None:
            names = {part for name in names for part in self.quantized.float_parts(name)}
        progress.stage("Checking weights", len(self._weights.files))
        for file in self._weights.files:
            check_finite(file, names)
            progress.step(file.name)
        progress.done()

    def load_whole(self, dtype: torch.dtype | None) -> PreTrainedModel:
        if self.quantized is not None:
            return FolderSource(self.path, trusted=self.trusted)._decode_whole(dtype or self.quantized.dtype)
        with quiet_transformers():
            auto = auto_class(self.model.config)
            return auto.from_pretrained(self.path, dtype=dtype or "auto", trust_remote_code=self.trusted).eval()

    def _decode_whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """Give this source's own model all weights, in a dtype; those that transformers keeps in float32 stay so."""
        model, plan = self.model, self.model._get_dtype_plan(dtype)
        for name, parameter in list(model.named_parameters()):
            if parameter.is_floating_point():
                cast_parameter(model, name, dtype)
        settings = LoadStateDictConfig(dtype=dtype, dtype_plan=plan, weight_mapping=self._conversions)
        self._read(list(self._targets), settings)
        for name, stored in self.tied.items():
            held = stored if not model.get_parameter(stored).is_meta else name
            for each in (name, stored):
                set_parameter(model, each, model.get_parameter(held))
        model.config.dtype = dtype
        return model

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.path, self.trusted)

    @property
    def code_files(self) -> list[Path]:
        return [file for file in sorted(self.path.glob("*.py")) if is_inside(file, self.path)] if self.trusted else []

    @cached_property
    def facts(self) -> dict[str, Any]:
        return facts_of_folder(self.path)


def _name_of(folder: Path) -> str:
    """Return the folder's name; for a snapshot in the hub's cache, the model's."""
    path = folder.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return path.name


def _read_config(folder: Path, trusted: bool) -> Any:
    check_config_file(folder / "config.json")
    try:
        with asking_in_words(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except ModelError:
        raise
    except Exception as error:  # transformers checks few settings: TypeError, ZeroDivisionError and others come too
        raise ModelError(
            f"{folder}: config.json is not one that transformers can use ({first_line(error)}); "
            "a decoder model that AutoModelForCausalLM knows is needed."
        ) from error
    return config
