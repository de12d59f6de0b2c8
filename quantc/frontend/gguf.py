"""A .gguf file, or the parts of a split one, dequantized tensor by tensor on the way in.

The config and the tensor names come from transformers' GGUF support, the block formats from the `gguf` package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import modeling_gguf_pytorch_utils as hf_gguf

from ..errors import ModelError
from ..numerics.statistics import all_finite
from .auto import build_skeleton, read_tokenizer
from .facts import facts_of_fields
from .finite import non_finite
from .gguf_files import PART, open_parts, parts_of
from .gguf_tensors import StoredTensors
from .gguf_transformers import NamesOnly, read_config, replaced
from .gguf_types import check_scales, check_types, dtype_of
from .on_demand import OnDemand
from .source import COMPUTE_DTYPE, Source, cast_parameter, quiet_transformers, set_parameter
from .unchanged import Span
from .weight_files import some

LARGE = 64 << 20  # bytes of an embedding in float32 of which only the rows are read that tokens look up


class GgufSource(Source):
    """A GGUF file, or all parts of one that was split, of which `file` is any.

    Raises ModelError when it is damaged, incomplete, or of an architecture that transformers cannot read.
    """

    def __init__(self, file: Path, name: str | None = None):
        self._files = parts_of(file)
        self.path = self._files[0]
        self.name = name or PART.sub("", file.stem)
        self.reader, files = open_parts(self._files)
        self._stored = StoredTensors(files)
        with self._parsed_once():
            self._config = read_config(self.path)
        self.model = build_skeleton(self._config)
        self.notes = self._check_headers()
        # GGUF has no float dtype of its own for the model; bfloat16 is what nearly all of them were trained in.
        self.model.config.dtype = torch.bfloat16

    @cached_property
    def _processor(self) -> Any:
        architecture = hf_gguf.read_field(self.reader, "general.architecture")[0]
        kind = hf_gguf.TENSOR_PROCESSORS.get(architecture, hf_gguf.TensorProcessor)
        return kind(config=self._config.to_dict())

    @contextlib.contextmanager
    def _parsed_once(self) -> Iterator[None]:
        """Give transformers our reader for the context: parsing a vocabulary takes seconds, and it parses per question.

        Its own progress bar is off too; it does not ask transformers' logging settings. Its other reader gets the
        names of all parts' tensors: a head in a later part tells that the head is not the embedding.
        """
        import gguf
        from transformers import integrations

        names = tuple(tensor.name for tensor in self.reader.tensors)
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaced(gguf, "GGUFReader", lambda *_, **__: self.reader))
            stack.enter_context(replaced(hf_gguf, "tqdm", lambda items, **_: items))
            if find_spec("transformers.integrations.gguf") is not None:  # of transformers 5.23, not of 5.10
                plain = integrations.gguf.read_gguf_metadata
                whole = replaced(integrations.gguf, "read_gguf_metadata", lambda *args: (plain(*args)[0], names))
                stack.enter_context(whole)
            yield

    def _check_headers(self) -> list[str]:
        """Return notes on tensors that the model does not take; raises ModelError where it needs missing ones."""
        shared = self.model.all_tied_weights_keys
        missing = [name for name, _ in self.model.named_parameters() if name not in self.tensors | shared]
        if missing:
            raise ModelError(
                f"{self.path}: the tensor {some(missing)} is not in the file; a complete GGUF file is needed, so fetch "
                "it again."
            )
        taken = {part.name: part for parts in self.tensors.values() for part in parts}
        left = [tensor for tensor in self.reader.tensors if tensor.name not in taken]
        check_types(self.path, taken.values())
        check_scales(self.path, taken.values(), left)
        names = some(tensor.name for tensor in left)
        return [f"tensors of the file are no part of the model and were left out: {names}"] if left else []

    @cached_property
    def _names(self) -> dict[str, str]:
        """GGUF tensor name -> model tensor name."""
        return hf_gguf.get_gguf_hf_weights_map(NamesOnly.of(self.model), self._processor)

    @cached_property
    def tensors(self) -> dict[str, list[Any]]:
        """Model tensor name -> the GGUF tensors it is made from (several where experts are merged)."""
        tensors: dict[str, list[Any]] = {}
        for tensor in self.reader.tensors:
            target = self._names.get(tensor.name) or self._names.get(tensor.name.removesuffix(".weight"))
            if target is not None:
                tensors.setdefault(target, []).append(tensor)
        return tensors

    def load(self, prefix: str) -> None:
        wanted = self.wanted_under(prefix)
        with self.unchanged:
            for name in self.tensors:
                if name in wanted:
                    _assign(self.model, name, self.decode(name))
        self.share_tied(prefix)
        self.check_loaded(prefix)

    def load_for_tokens(self, prefix: str) -> None:
        """See Source; rows of a large embedding are decoded when tokens look them up."""
        parameter = dict(self.model.named_parameters()).get(prefix)
        large = parameter is not None and parameter.nbytes >= LARGE
        if parameter is self.model.get_input_embeddings().weight and large and self._as_stored(prefix):
            table = OnDemand.of(tuple(parameter.shape), partial(self._rows, prefix), partial(self._whole, prefix))
            set_parameter(self.model, prefix, nn.Parameter(table, requires_grad=False))
            self.share_tied(prefix)
        else:
            self.load(prefix)

    def _whole(self, name: str) -> torch.Tensor:
        """Return a large embedding, float32 (V, K)."""
        return self._rows(name, torch.arange(self.model.get_parameter(name).shape[0]))

    def _rows(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return rows of a large embedding by their sorted numbers, float32 (R, K)."""
        with self.unchanged:
            found = torch.from_numpy(self._stored.rows(self.tensors[name][0], numbers))
        if not all_finite(found):
            raise self._non_finite(name)
        return found

    def decode(self, name: str) -> torch.Tensor:
        """Return a tensor of the model, float32."""
        return self.convert(name, ((part.name, self._stored.values(part)) for part in self.tensors[name]))

    def convert(self, name: str, parts: Iterable[tuple[str, np.ndarray[Any, Any]]]) -> torch.Tensor:
        """Return a tensor of the model, float32, from tensors of the file: their names, and values that may be changed.

        transformers permutes rows, shifts norms and merges experts here.
        """
        merged: dict[str, Any] = {"tensors": {}, "config": self._config.to_dict()}
        for part, weights in parts:
            result = self._processor.process(
                weights=weights, name=part, tensor_key_mapping=self._names, parsed_parameters=merged
            )
            if result.name is not None:
                return torch.from_numpy(np.ascontiguousarray(result.weights, dtype=np.float32))
        return merged["tensors"][name].to(COMPUTE_DTYPE)

    def strips(self, name: str) -> Iterator[torch.Tensor]:
        """See Source; decoded strip by strip where the file has the tensor as the model has it."""
        if not self._as_stored(name):
            yield from super().strips(name)
            return
        with self.unchanged:
            for values in self._stored.strips(self.tensors[name][0]):
                strip = torch.from_numpy(values)
                if not all_finite(strip):
                    raise self._non_finite(name)
                yield strip

    def _as_stored(self, name: str) -> bool:
        """Return whether a parameter is a tensor of the file as it is: transformers then returns what it is given."""
        part, shape = self.tensors[name][0], self.model.get_parameter(name).shape
        if len(self.tensors[name]) != 1 or tuple(reversed(part.shape.tolist())) != shape:
            return False
        given = np.broadcast_to(np.float32(0), shape)
        merged: dict[str, Any] = {"tensors": {}, "config": self._config.to_dict()}
        made = self._processor.process(
            weights=given, name=part.name, tensor_key_mapping=self._names, parsed_parameters=merged
        )
        return made.weights is given and made.name is not None

    def _non_finite(self, name: str) -> ModelError:
        bad = sum(int((~np.isfinite(values)).sum()) for values in self._stored.strips(self.tensors[name][0]))
        return non_finite(self.path, name, bad, int(self.tensors[name][0].n_elements))

    def read(self, part: Any) -> np.ndarray[Any, Any]:
        """Return a tensor's bytes as the reader has them, but not mapped."""
        return self._stored.bytes(part)

    def spans(self, file: Path) -> list[Span]:
        """Return where the header and every tensor are."""
        parts = [part for part in self.reader.tensors if self._stored.files[part.name] == file]
        found = sorted((int(part.data_offset), int(part.n_bytes)) for part in parts)
        return [(0, min((start for start, _ in found), default=0)), *found]

    def stored_dtype(self, name: str) -> torch.dtype:
        parts = self.tensors.get(name, [])
        return dtype_of(parts[0]) if parts else torch.float16

    def stored_bits(self, name: str) -> float:
        parts = self.tensors[name]
        return 8 * sum(int(part.n_bytes) for part in parts) / sum(int(part.n_elements) for part in parts)

    def weight_files(self) -> list[Path]:
        return self._files

    def load_whole(self, dtype: torch.dtype | None) -> PreTrainedModel:
        if len(self._files) > 1:  # which transformers cannot read
            return self._load_parts(dtype or torch.bfloat16)
        with quiet_transformers(), self._parsed_once():
            return AutoModelForCausalLM.from_pretrained(
                self.path.parent, gguf_file=self.path.name, dtype=dtype or self.model.config.dtype
            ).eval()

    def _load_parts(self, dtype: torch.dtype) -> PreTrainedModel:
        source = GgufSource(self.path)
        model, parameters = source.model, {name for name, _ in source.model.named_parameters()}
        for name in [name for name in model.state_dict() if name not in source.tied]:
            source.load(name)
            if name in parameters:
                cast_parameter(model, name, dtype)
        for name, stored in source.tied.items():
            set_parameter(model, name, model.get_parameter(stored))
        model.config.dtype = dtype
        return model

    @cached_property
    def facts(self) -> dict[str, Any]:
        return facts_of_fields(lambda name: hf_gguf.read_field(self.reader, name))

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        with quiet_transformers(), self._parsed_once():
            return read_tokenizer(self.path.parent, gguf_file=self.path.name)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    expected = getattr(owner, leaf)
    if expected.shape != tensor.shape:
        raise ModelError(
            f"{name} has the shape {tuple(tensor.shape)}, but the file's own header describes "
            f"{tuple(expected.shape)}; the GGUF file is damaged or of an unknown layout."
        )
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
