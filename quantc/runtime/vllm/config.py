"""The only file that vLLM's loader asks: how each layer of a quantc checkpoint is stored, and what runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from ...checkpoint.config import PackedEntry, read_quantization, read_residual_rotation
from ...checkpoint.integrity import METHOD
from ...errors import CheckpointError
from .blocks import BlockRotation
from .construction import Construction
from .experts import PackedExpertsMethod
from .linear import Member, PackedLinearMethod
from .names import rename, renamed_parts
from .table import PackedTableMethod

LEAST_CAPABILITY = 75  # of a CUDA device that has the kernels' instructions
HEADS = ("lm_head", "embed_out", "output")  # what models call the module of an untied head


class QuantcConfig(QuantizationConfig):
    """The `quantization_config` of a quantc checkpoint; see docs/format.md.

    entries: how each weight is stored, by the names that vLLM has for modules, before it fuses any.
    """

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        described = {"quantization_config": settings}
        self.entries = read_quantization(described)
        residual = read_residual_rotation(described)
        self._rotation = None if residual is None else BlockRotation(residual)
        self._tied, self._renamed = False, dict[str, str]()
        listeners = [self._claim_table] if self._rotation is None else [self._claim_table, self._rotation.registered]
        self._construction = Construction(listeners)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantcConfig:
        """Read the config; raises CheckpointError for one that is changed, or newer than this quantc."""
        return cls(config)

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: config.json has it."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take note whether the head is the embedding, and of names that vLLM has from the original checkpoints."""
        if hf_config is None:
            return
        text = hf_config.get_text_config()
        self._tied = bool(getattr(text, "tie_word_embeddings", False))
        self._renamed = renamed_parts(text.model_type)
        self.entries = {rename(name, self._renamed): entry for name, entry in self.entries.items()}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Return how vLLM is to rename tensors, beside what it does by itself."""
        return WeightsMapper(orig_to_new_substr=self._renamed)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename what the checkpoint names as vLLM renames the tensors."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)
        if self._rotation is not None:
            self._rotation.rename(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what loads and runs a layer; None for those that vLLM runs as they are."""
        self._construction.start()
        if self._rotation is not None:
            self._rotation.saw(layer, prefix)
        if isinstance(layer, LinearBase):
            members = self._members(prefix)
            packed = any(member.entry is not None for member in members)
            return PackedLinearMethod(members, self._built) if packed else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self._table_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            stacks = {name.removeprefix(f"{prefix}."): entry for name, entry in self.entries.items() if entry.leading}
            own = {leaf: entry for leaf, entry in stacks.items() if "." not in leaf}
            return PackedExpertsMethod(layer.moe_config, prefix, own, self._built) if own else None
        return None

    def _members(self, prefix: str) -> list[Member]:
        """Return the linears of the checkpoint that a linear of vLLM multiplies at once, in their order."""
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{each}" if parent else each for each in leaves]
        return [Member(name, self.entries.get(name)) for name in names]

    def _table_method(self, layer: Any, prefix: str) -> PackedTableMethod | None:
        name = self._table(layer, prefix)
        return None if name is None else PackedTableMethod(name, self.entries[name], self._built)

    def _table(self, layer: Any, prefix: str) -> str | None:
        """Return the name of the packed table of an embedding or a head, None where it is not packed.

        Some models of vLLM do not tell a layer its name: then it is the table of its size.
        """
        if prefix and f"{prefix}.weight" in self.entries:
            return f"{prefix}.weight"
        is_head = isinstance(layer, ParallelLMHead)
        if prefix and not (is_head and self._tied):
            return None
        size, of_head = (layer.org_vocab_size, layer.embedding_dim), is_head and not self._tied
        found = [
            name for name, entry in self.entries.items() if entry.shape == size and _is_table(name, entry, of_head)
        ]
        if len(found) > 1:
            raise CheckpointError(
                f"the checkpoint packs {' and '.join(found)}, and vLLM does not say which one a layer is; quantize the "
                "model again with --head-bits keep."
            )
        return found[0] if found else None

    def _claim_table(self, parent: nn.Module, name: str, module: nn.Module) -> None:
        """Give an embedding or a head its packed table where vLLM's model does not ask how it is stored."""
        for layer in module.modules():
            if isinstance(layer, VocabParallelEmbedding) and type(layer.quant_method) is UnquantizedEmbeddingMethod:
                if (method := self._table_method(layer, "")) is not None:
                    del layer.weight
                    method.create_weights(layer, params_dtype=layer.params_dtype)
                    layer.quant_method, layer.use_fused_embedding = method, False

    def _built(self) -> None:
        """Stop to follow the model; raises CheckpointError if it has no blocks where hidden states rotate."""
        self._construction.stop()
        if self._rotation is not None:
            group = get_pp_group()
            self._rotation.check(group.is_first_rank, group.is_last_rank)


def _is_table(name: str, entry: PackedEntry, of_head: bool) -> bool:
    parent, _, leaf = name.rpartition(".")
    return leaf == "weight" and not entry.leading and (parent.rpartition(".")[2] in HEADS) == of_head
