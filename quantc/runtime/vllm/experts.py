"""Packed stacks of experts in vLLM: each expert that tokens were sent to is multiplied by itself.

torch.compile sees an operator: which experts run depends on the tokens. It finds them by name in vLLM's context of the
model that runs, since compiled code is kept for other processes, where all else is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from ...checkpoint.config import PackedEntry
from ...errors import CheckpointError
from .members import Loading, never_came, table_of

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define("experts(Tensor x, Tensor shares, Tensor chosen, str name) -> Tensor")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
GATE_UP, DOWN = "gate_up_proj", "down_proj"
ALIASES = {"w2": DOWN}  # what some models of vLLM rename a stack to


class PackedExpertsMethod(FusedMoEMethodBase):
    """entries: how the stacks gate_up_proj and down_proj are stored; one that has none is of floats.

    name: of the module of the experts in the checkpoint. check: what is left to check once the whole model is built.
    """

    def __init__(self, moe: Any, name: str, entries: dict[str, PackedEntry], check: Callable[[], None]):
        super().__init__(moe)
        self._name, self._entries, self._check = name, entries, check

    def create_weights(self, layer: Any, *_: Any, params_dtype: torch.dtype, **__: Any) -> None:
        """Let the experts take the tensors of the stacks; raises CheckpointError for what it cannot run."""
        parallel = self.moe.moe_parallel_config
        if parallel.tp_size > 1 or parallel.use_ep:
            raise CheckpointError(
                f"{self._name} has packed experts, which run in one process only; pass --tensor-parallel-size 1, or "
                "export the checkpoint with `quantc export --to vllm`."
            )
        if layer.activation.value not in ACTIVATIONS or layer.apply_router_weight_on_input:
            raise CheckpointError(
                f"{self._name} has experts with the activation {layer.activation.value}, which packed ones do not have "
                "in vLLM; export the checkpoint with `quantc export --to vllm`."
            )
        self._key = f"quantc.{self._name}"
        get_current_vllm_config().compilation_config.static_forward_context[self._key] = self
        self._activation = ACTIVATIONS[layer.activation.value]
        self._loading = {leaf: Loading(f"{self._name}.{leaf}", entry) for leaf, entry in self._entries.items()}
        self._dtype, self._device = params_dtype, torch.empty(0).device
        self._floats: dict[str, torch.Tensor] = {}
        layer.load_weights = self._load  # vLLM's own knows the stacks of floats alone

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        for name, tensor in weights:
            leaf, _, part = name.partition(".")
            leaf = ALIASES.get(leaf, leaf)
            if leaf in self._loading:
                self._loading[leaf].take(part, tensor)
            elif leaf in (GATE_UP, DOWN) and not part:
                self._floats[leaf] = tensor.to(self._device, self._dtype, copy=True)
            else:
                raise CheckpointError(
                    f"the files have the tensor {self._name}.{name}, which no packed experts have; copy the checkpoint "
                    "again."
                )
            yield name

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put packed stacks in place of the tensors that came."""
        self._stacks = {}
        for leaf, loading in self._loading.items():
            (weight,) = loading.finish()
            self._stacks[leaf] = table_of(*weight, self._dtype, self._device)
        layer.packed = nn.ModuleDict(self._stacks)
        if missing := {GATE_UP, DOWN} - set(self._loading) - set(self._floats):
            raise never_came(f"{self._name}.{min(missing)}")
        self._check()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return nothing: vLLM's kernels do not run."""

    def apply(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Return y (M, K) for x (M, K), the experts topk_ids (M, T) of each token, and their shares topk_weights."""
        y: torch.Tensor = torch.ops.quantc.experts(x, topk_weights, topk_ids, self._key)
        return y

    def run(self, x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return what `apply` does."""
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = self._multiply(GATE_UP, expert, x[token]).chunk(2, -1)
            found = self._multiply(DOWN, expert, self._activation(gate) * up)
            y.index_add_(0, token, (found * shares[token, place, None]).to(y.dtype))
        return y

    def _multiply(self, leaf: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        if leaf in self._floats:
            return F.linear(x, self._floats[leaf][expert])
        return self._stacks[leaf].multiply(x, expert)


@torch.library.impl(LIBRARY, "experts", "CompositeExplicitAutograd")
def _experts(x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name].run(x, shares, chosen)


@torch.library.register_fake("quantc::experts", lib=LIBRARY)
def _fake_experts(x: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)
