"""The packed embedding of a model in vLLM, and its head, which may be the same table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from ...checkpoint.config import PackedEntry
from ..layers import PackedWeight
from .members import Loading, Slice, expect, forget, table_of


class PackedTableMethod(QuantizeMethodBase):
    """name: of the table in the checkpoint. check: what is left to check once the whole model is built.

    The table is a module called weight, as the checkpoint names its tensors.
    """

    def __init__(self, name: str, entry: PackedEntry, check: Callable[[], None]):
        self._name, self._entry, self._check = name, entry, check

    def create_weights(self, layer: Any, *_: Any, params_dtype: torch.dtype, **__: Any) -> None:
        """Let a layer take the tensors of the table."""
        rows = layer.shard_indices
        cut = Slice(0, rows.org_vocab_start_index, rows.org_vocab_end_index)
        self._loading = Loading(self._name, self._entry, (cut,))
        self._parts = self._loading.dtypes()
        self._dtype = params_dtype
        layer.weight = nn.Module()
        expect(layer.weight, self._parts, lambda part, tensor, _: self._loading.take(part, tensor))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the packed table in place of the tensors that came; a head that is the embedding has it already."""
        if isinstance(layer.weight, PackedWeight):
            return
        device = layer.weight.get_parameter(next(iter(self._parts))).device
        forget(layer.weight, self._parts)
        (weight,) = self._loading.finish()
        layer.weight = table_of(*weight, self._dtype, device)
        self._check()

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """Return the embedding, which is the head too."""
        return embed_tokens

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Return rows of the table, float (..., K)."""
        rows: torch.Tensor = layer.weight.rows(input_)
        return rows

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (..., V) of hidden states (..., K); what pads the vocabulary to whole slices is 0."""
        y: torch.Tensor = layer.weight.multiply(x)
        if (filler := layer.num_embeddings_per_partition - y.shape[-1]) and layer.tp_size > 1:
            y = F.pad(y, (0, filler))
        return y if bias is None else y + bias
