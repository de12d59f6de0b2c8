"""The metadata of a GGUF file beside its tokenizer: what the model is, and its architecture's hyper-parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .architectures import Architecture, architecture_of
from .file import Metadata
from .layout import FileTensor
from .tokenizer import describe_tokenizer, without_tokenizer

UNNAMED = 1024  # the type that readers show as guessed
QUANTIZATION_VERSION = 2  # of ggml's block layouts
# Numbers by which readers show what most weights of a file are stored as.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15,
    "Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38,
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """What a file says besides its weights.

    architecture: its name in GGUF. table: how a model of transformers becomes its tensors; None where those of a GGUF
    file that the model comes from stay as they are.
    """

    architecture: str
    metadata: Metadata
    table: Architecture | None = None


def describe_file(config: Any, words: PreTrainedTokenizerBase | None, name: str, pre: str | None = None) -> Described:
    """Return what a file says of a model of transformers; raises ModelError for what llama.cpp does not know.

    words: the tokenizer, None for a file without one. pre: see `describe_tokenizer`.
    """
    table = architecture_of(config)
    tokenizer = without_tokenizer() if words is None else describe_tokenizer(words, config.vocab_size, pre)
    return Described(table.name, describe_model(table, config, name) | tokenizer, table)


def describe_model(architecture: Architecture, config: Any, name: str) -> Metadata:
    """Return what the file says of the model, but for how its weights are stored."""
    settings = {f"{architecture.name}.{key}": value for key, value in architecture.settings(config).items()}
    return {"general.type": "model", "general.name": name} | settings


def describe_storage(tensors: Sequence[FileTensor]) -> Metadata:
    """Return what the file says of how its weights are stored."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    weights: Counter[str] = Counter()
    for tensor in matrices:
        weights[tensor.type_name] += tensor.nbytes
    common = weights.most_common(1)[0][0] if weights else "F32"
    return {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": FILE_TYPES.get(common, UNNAMED)}
