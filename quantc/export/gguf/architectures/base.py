"""What a table of an architecture says: names of tensors, changes to their rows, and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....errors import ModelError

Rows = Callable[[Any, int], torch.Tensor]  # (config, N) -> the model's rows in the file's order
Settings = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file made from a tensor of the model.

    name: in the file, without its ending; {} is the block's number. rows: which rows of the model's tensor it has, and
    in which order. added: what is added to its values. transposed: the model stores (K, N). floats: it is stored in
    float32 whatever the model has, as llama.cpp wants it.
    """

    name: str
    rows: Rows | None = None
    added: float = 0.0
    transposed: bool = False
    floats: bool = False


Entry = str | Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Architecture:
    """One architecture of GGUF, and the transformers models that are stored as it.

    tensors: name in the model without `.weight` or `.bias`, {} for a block's number -> name in the file. settings:
    hyper-parameters without the architecture's prefix, from a config. check: raises ModelError for settings of a config
    that llama.cpp computes otherwise. extra: tensors of the file that are no weights of the model. activations: names
    of the activation function that llama.cpp has there. ropes: kinds of rope scaling that it has. windows: whether it
    attends in sliding windows.
    """

    name: str
    model_types: tuple[str, ...]
    tensors: Mapping[str, Entry]
    settings: Callable[[Any], Settings]
    check: Callable[[Any], None] = lambda _: None
    extra: Callable[[Any], dict[str, torch.Tensor]] = lambda _: {}
    activations: tuple[str, ...] = ("silu", "swish")
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    windows: bool = False


def same_name(modules: Iterable[tuple[str, Entry]], prefix: str = "model.layers.{}.") -> dict[str, Entry]:
    """Return entries of modules inside the blocks: names relative to a block -> names relative to it in the file."""
    return {prefix + name: _in_block(entry) for name, entry in modules}


def _in_block(entry: Entry) -> Entry:
    if isinstance(entry, str):
        return f"blk.{{}}.{entry}"
    if isinstance(entry, tuple):
        return tuple(_named(part) for part in entry)
    return _named(entry)


def _named(part: Tensor) -> Tensor:
    return Tensor(f"blk.{{}}.{part.name}", part.rows, part.added, part.transposed, part.floats)


def query_rows(config: Any, n: int) -> torch.Tensor:
    """Return the rows of a query projection for a rotation of neighbours; the model rotates halves of a head."""
    return _neighbours(n, config.num_attention_heads)


def key_rows(config: Any, n: int) -> torch.Tensor:
    """Return the rows of a key projection for a rotation of neighbours."""
    return _neighbours(n, config.num_key_value_heads)


def _neighbours(n: int, heads: int) -> torch.Tensor:
    return torch.arange(n).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()


def first_half(_: Any, n: int) -> torch.Tensor:
    """Return the first half of n rows."""
    return torch.arange(n // 2)


def second_half(_: Any, n: int) -> torch.Tensor:
    """Return the second half of n rows."""
    return torch.arange(n // 2, n)


EMBEDDING: dict[str, Entry] = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION: tuple[tuple[str, Entry], ...] = (
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
)
ROTARY_NEIGHBOURS: tuple[tuple[str, Entry], ...] = (
    ("self_attn.q_proj", Tensor("attn_q", query_rows)),
    ("self_attn.k_proj", Tensor("attn_k", key_rows)),
)
HEAD_NORMS: tuple[tuple[str, Entry], ...] = (
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
)
FEED_FORWARD: tuple[tuple[str, Entry], ...] = (
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)
EXPERTS: tuple[tuple[str, Entry], ...] = (
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate", Tensor("ffn_gate_inp", floats=True)),
    ("mlp.experts.gate_up_proj", (Tensor("ffn_gate_exps", first_half), Tensor("ffn_up_exps", second_half))),
    ("mlp.experts.down_proj", "ffn_down_exps"),
)


def head_width(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def decoder_settings(config: Any) -> Settings:
    """Return the hyper-parameters that decoders with RMS norms and rotary positions share."""
    settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_width(config),
        "vocab_size": config.vocab_size,
    }
    return settings | rope_settings(full_rope(config))


def expert_settings(config: Any) -> Settings:
    """Return the hyper-parameters of routed experts."""
    return {
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def full_rope(config: Any) -> dict[str, Any]:
    """Return the rope parameters of layers that attend to everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get(FULL, found))


def rope_settings(rope: dict[str, Any]) -> Settings:
    """Return the hyper-parameters of rotary positions; kinds that are tensors in the file add only their base."""
    settings: Settings = {"rope.freq_base": float(rope.get("rope_theta", 10000.0))}
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        settings |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        settings["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if rope.get(key) is not None:
                settings[f"rope.scaling.{name}"] = float(rope[key])
    return settings


def window_period(config: Any) -> int:
    """Return p where the last of every p layers attends to everything and the others in a window; raises ModelError."""
    kinds = list(config.layer_types)
    count = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if kinds != [FULL if place % count == count - 1 else SLIDING for place in range(len(kinds))]:
        raise unlike(config, "layer_types", "another order of layers", "a window in all but every p-th layer")
    return count


def unlike(config: Any, name: str, value: object, needed: object) -> ModelError:
    """Return the error for a setting that llama.cpp has another value of."""
    return ModelError(
        f"the {config.model_type} model has {name} {value}, but llama.cpp computes this architecture with {needed}; it "
        "cannot be exported to GGUF."
    )


def check_equal(config: Any, **needed: Any) -> None:
    """Raise ModelError where a setting of the config is not the one that llama.cpp computes with."""
    for name, value in needed.items():
        if (found := getattr(config, name, value)) != value:
            raise unlike(config, name, found, value)
