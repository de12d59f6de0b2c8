"""Source: a model whose tensors are read when asked for, into a skeleton that starts on the meta device."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ..errors import ModelError
from ..numerics.statistics import all_finite
from ..numerics.strips import strips_of
from ..progress import Progress
from .finite import non_finite
from .unchanged import Span, Unchanged, fingerprint, safetensors_spans, small_files, whole_digest

PathLike = str | os.PathLike[str]

COMPUTE_DTYPE = torch.float32


class Source(ABC):
    """A model on disk.

    name: short name, used in output names. path: what it was opened from. model: the skeleton, parameters on
    the meta device, buffers real; every tensor of it has the name that transformers gives it. notes: what a reader of
    the report should know of the files. trusted: whether code that the model brings may be run.
    """

    name: str
    path: Path
    model: PreTrainedModel
    notes: list[str]
    trusted: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model's config asks for; float32 where it says nothing."""
        dtype = self.model.config.dtype
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @abstractmethod
    def load(self, prefix: str) -> None:
        """Give every parameter and persistent buffer of `model` under `prefix` its weights, in float32.

        `prefix` is a module or tensor name. Raises ModelError that names the tensor for a missing, mis-shaped
        or non-finite one.
        """

    def load_for_tokens(self, prefix: str) -> None:
        """Load as `load` does, for running the model on tokens: of a large embedding only rows may be read, later."""
        self.load(prefix)

    def strips(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the rows of a parameter (N, K) in strips, float32; raises as `load` does, which may load it whole."""
        self.load(name)
        yield from strips_of(self.model.get_parameter(name).detach())

    @abstractmethod
    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which the source stores the tensor of this name."""

    def stored_bits(self, name: str) -> float:
        """Return the bits per value with which the source stores the tensor of this name."""
        return 8.0 * self.stored_dtype(name).itemsize

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """Return the files the weights are read from."""

    def check_values(self, progress: Progress) -> None:  # noqa: B027
        """Raise ModelError that names a tensor with NaN or infinity, where reading all of them is cheap; `load` does so
        for what it loads in any case."""

    @cached_property
    def unchanged(self) -> Unchanged:
        """Return a context manager for reading the weight files; it raises ChangedSource where one has changed."""
        return Unchanged(self.weight_files())

    def spans(self, file: Path) -> list[Span]:
        """Return where a weight file's header and tensors are."""
        return safetensors_spans(file)

    def contents(self) -> dict[str, str]:
        """Return file name -> digest of its content: for weight files, the whole header and samples of every tensor."""
        with self.unchanged:
            weights = {file.name: fingerprint(file, self.spans(file)) for file in self.weight_files()}
        small = small_files(self.path) if self.path.is_dir() else []
        return weights | {file.name: whole_digest(file) for file in small}

    @abstractmethod
    def load_whole(self, dtype: torch.dtype | None) -> PreTrainedModel:
        """Return the unquantized model in memory, for evaluation; dtype None keeps the model's own."""

    @abstractmethod
    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """Read the model's tokenizer; raises ModelError when there is none."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.read_tokenizer()

    @cached_property
    def optional_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where there is none that can be read."""
        try:
            return self.tokenizer
        except ModelError:
            return None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Return what the model says of itself in the hub's words, such as license and language; see facts.py."""
        return {}

    @property
    def code_files(self) -> list[Path]:
        """The Python files that the model brings and that a copy of it needs."""
        return []

    @cached_property
    def tied(self) -> dict[str, str]:
        """Tensor -> the tensor whose weights it shares."""
        return dict(self.model.all_tied_weights_keys)

    def wanted_under(self, prefix: str) -> set[str]:
        """Return the names to read for a prefix: those under it, with shared tensors by the name that is stored."""
        names = [name for name, _ in tensors_under(self.model, prefix)]
        return {self.tied.get(name, name) for name in names}

    def share_tied(self, prefix: str) -> None:
        """Let tensors under prefix share the weights just read; what is elsewhere goes back to meta."""
        parameters = self.model.get_parameter
        for target, stored in self.tied.items():
            if not parameters(stored).is_meta and (is_under(target, prefix) or is_under(stored, prefix)):
                set_parameter(self.model, target, parameters(stored))
        for name in self.wanted_under(prefix):
            if not is_under(name, prefix) and name in self.tied.values():
                set_parameter(self.model, name, nn.Parameter(parameters(name).to("meta"), requires_grad=False))

    def check_loaded(self, prefix: str) -> None:
        """Raise ModelError when a tensor under prefix is still missing, or holds NaN or infinity.

        Buffers may be infinite: the bounds of what clips nothing are.
        """
        for name, tensor in tensors_under(self.model, prefix):
            if tensor.is_meta:
                raise ModelError(
                    f"{self.path}: the tensor {name} is not in the checkpoint; "
                    "a complete checkpoint is needed, so fetch or save the model again."
                )
            allowed = not isinstance(tensor, nn.Parameter) and not bool(tensor.isnan().any())
            if tensor.is_floating_point() and tensor.numel() and not allowed and not all_finite(tensor):
                raise non_finite(self.path, name, int((~torch.isfinite(tensor)).sum()), tensor.numel())


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in place of the one of this name, whatever its device."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter


def cast_parameter(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Put a parameter into another dtype, until it is loaded again; what shares it keeps it as it was."""
    set_parameter(model, name, nn.Parameter(model.get_parameter(name).to(dtype), requires_grad=False))


def tensors_under(model: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Return (name, tensor) of every parameter and persistent buffer that is `prefix` or is below it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_under(name, prefix):
            yield name, tensor


def is_under(name: str, prefix: str) -> bool:
    """Return whether a tensor name is the prefix or is below it."""
    return name == prefix or name.startswith(prefix + ".")


def to_meta(module: nn.Module) -> None:
    """Free the parameters of a module: they go back to the meta device, to be loaded as at first; buffers stay."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                dtype = COMPUTE_DTYPE if parameter.is_floating_point() else parameter.dtype
                child._parameters[name] = nn.Parameter(parameter.to("meta", dtype), requires_grad=False)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off transformers' progress bars and loading reports: quantc shows its own."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
