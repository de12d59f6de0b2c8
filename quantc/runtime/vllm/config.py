"""The only file that vLLM's loader asks: how each layer of a quantc checkpoint is stored, and what runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ...checkpoint.config import PackedEntry, read_quantization, read_residual_rotation
from ...checkpoint.integrity import METHOD
from ...errors import CheckpointError
from .blocks import BlockRotation
from .linear import Member, PackedLinearMethod
from .table import PackedTableMethod

LEAST_CAPABILITY = 70  # of a CUDA device that has the kernels' instructions


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
        self._tied = False

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
        """Take note whether the head is the embedding."""
        text = None if hf_config is None else hf_config.get_text_config()
        self._tied = bool(getattr(text, "tie_word_embeddings", False))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename what the checkpoint names as vLLM renames the tensors."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)
        if self._rotation is not None:
            self._rotation.rename(hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what loads and runs a layer; None for those that vLLM runs as they are."""
        if self._rotation is not None:
            self._rotation.saw(layer, prefix)
        if isinstance(layer, LinearBase):
            members = self._members(prefix)
            packed = any(member.entry is not None for member in members)
            return PackedLinearMethod(members, self._check_blocks) if packed else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            name = self._table(layer, prefix)
            return None if name is None else PackedTableMethod(name, self.entries[name], self._check_blocks)
        if isinstance(layer, RoutedExperts) and any(name.startswith(f"{prefix}.") for name in self.entries):
            raise CheckpointError(
                f"{prefix} has packed experts, which quantc does not run in vLLM yet; export the checkpoint with "
                "`quantc export --to vllm`, or quantize the model with its experts kept."
            )
        return None

    def _members(self, prefix: str) -> list[Member]:
        """Return the linears of the checkpoint that a linear of vLLM multiplies at once, in their order."""
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{each}" if parent else each for each in leaves]
        return [Member(name, self.entries.get(name)) for name in names]

    def _table(self, layer: VocabParallelEmbedding, prefix: str) -> str | None:
        """Return the name of the packed table of an embedding or a head, None where it is not packed.

        Some models of vLLM do not tell their embedding its name: then it is the table of its size that is no head.
        """
        own = f"{prefix}.weight"
        if own in self.entries:
            return own
        is_head = isinstance(layer, ParallelLMHead)
        if prefix and not (is_head and self._tied):
            return None
        size = (layer.org_vocab_size, layer.embedding_dim)
        found = [name for name, entry in self.entries.items() if _is_embedding(name, entry) and entry.shape == size]
        if len(found) > 1:
            raise CheckpointError(
                f"the checkpoint packs {' and '.join(found)}, and vLLM does not say which one a layer is; quantize the "
                "model again with --head-bits keep."
            )
        return found[0] if found else None

    def _check_blocks(self) -> None:
        """Raise CheckpointError if the model is built and has no blocks of the names where hidden states rotate."""
        if self._rotation is not None:
            group = get_pp_group()
            self._rotation.check(group.is_first_rank, group.is_last_rank)


def _is_embedding(name: str, entry: PackedEntry) -> bool:
    return name.endswith(".weight") and not entry.leading and name.split(".")[-2] not in ("lm_head", "output")
