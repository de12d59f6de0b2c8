"""Models and tokenizers from transformers' Auto classes, whose refusals become sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import ModelError
from ..files.whole_file import utf8_path
from .source import COMPUTE_DTYPE, quiet_transformers


def _configs(config: Any) -> list[Any]:
    """Return a config, and those of its parts."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return [config, *(part for part in parts if part is not None)]


def build_skeleton(config: Any, trusted: bool = False) -> PreTrainedModel:
    """Return the model of a config with parameters on the meta device and real buffers (rotary tables and the like).

    Its config keeps the dtypes that the files name, where transformers writes the one that it has built the model in.
    """
    named = [part.dtype for part in _configs(config)]
    try:
        with init_empty_weights(include_buffers=False), quiet_transformers(), asking_in_words(config.name_or_path):
            model = auto_class(config).from_config(config, dtype=COMPUTE_DTYPE, trust_remote_code=trusted)
    except ModelError:
        raise
    except Exception as error:  # a setting of another type or range ends in any kind of exception
        raise ModelError(
            f"transformers cannot build {type(config).__name__} ({first_line(error)}); a decoder model that "
            "AutoModelForCausalLM knows is needed."
        ) from error
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            # Experts run one at a time, so that the rows and weights of each can be told apart.
            module.config._experts_implementation = "eager"
    for part, dtype in zip(_configs(model.config), named, strict=True):
        part.dtype = dtype
    return model.eval().requires_grad_(False)


def auto_class(config: Any) -> Any:
    """Return the auto class that builds the model named in a config's `architectures`, with its tower or without.

    Where none is named it is the first that knows the config, and AutoModelForCausalLM where none does, or where the
    model is an encoder and a decoder.
    """
    encoder = getattr(config, "is_encoder_decoder", False)
    others = () if encoder else (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    known = [auto for auto in (AutoModelForCausalLM, *others) if type(config) in auto._model_mapping]
    named = [auto for auto in known if _class_name(auto, config) in (getattr(config, "architectures", None) or ())]
    return (*named, *known, AutoModelForCausalLM)[0]


def _class_name(auto: Any, config: Any) -> str:
    found = auto._model_mapping[type(config)]
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def read_tokenizer(folder: Path, trusted: bool = False, **options: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder; raises ModelError when there is none that transformers can read."""
    try:
        with asking_in_words(folder):
            return AutoTokenizer.from_pretrained(utf8_path(folder), trust_remote_code=trusted, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder}: no tokenizer could be read ({first_line(error)}); calibration and evaluation need one, "
            "so put the model's tokenizer files into its folder."
        ) from error


@contextlib.contextmanager
def asking_in_words(folder: Path | str) -> Iterator[None]:
    """Turn a refusal to run code that a folder brings into a ModelError that names the option which allows it.

    transformers is always told whether it may: left alone it asks on the terminal, and waits.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise needs_code(folder) from error


def needs_code(folder: Path | str) -> ModelError:
    """Return the error for a model or tokenizer whose own code would have to be run."""
    return ModelError(
        f"{folder} needs code that it brings along (auto_map in its config), which is not run unasked; read that code, "
        "then pass --trust-remote-code (in Python trust_remote_code=True)."
    )


def first_line(error: Exception) -> str:
    """Return what an exception of another library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
