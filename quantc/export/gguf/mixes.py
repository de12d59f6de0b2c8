"""Which types llama.cpp's quantizer would give the tensors of a file, for each of its mixes.

The rules are those of src/llama-quant.cpp in llama.cpp's release v0.5.0, with an importance matrix: a mix has a type
for most tensors, and others for those where that has paid. They are here for the sizes that they lead to; quantc itself
chooses types by what it measures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from ...errors import UsageError
from .blocks import TYPES, BlockType
from .file import Typed
from .layout import NUMBER, FileTensor
from .metadata import Described

# Mix -> the type of tensors that no rule is for.
MIXES = {
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q5_K_S": "Q5_K", "Q5_1": "Q5_1", "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_1": "Q4_1", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_S": "Q3_K", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K",
}  # fmt: skip
# Where 256 does not divide a row: the type of blocks of 32 that is taken.
SMALLER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
OWN_RULES = ("falcon",)  # architectures with rules that are not in these tables
SHARED_HEADS = 4  # queries that read the same values, from which on these are few and get more bits
EXPERTS = 8  # of a block, for which Mixtral's rules hold
# Architecture and blocks of models of "70B", and from which sharing on they count as such.
LARGE = {("llama", 80): 2, ("qwen2", 80): 0, ("deci", 80): 0, ("jais2", 68): 0}

KINDS = (  # in this order: what a name contains -> what it is called in the tables below
    ("attn_qkv.weight", "values"), ("attn_kv_b.weight", "values"), ("attn_v.weight", "values"),
    ("attn_k.weight", "keys"), ("attn_output.weight", "attention output"), ("ffn_down", "down"),
)  # fmt: skip
TABLES, HEAD = ("token_embd.weight", "per_layer_token_embd.weight"), "output.weight"
FLOATS = re.compile(  # names of matrices that stay floats, of those that models have whose metadata can be read here
    r"_norm\.weight$|ffn_gate_inp\.weight$|position_embd|token_types|altup|laurel|per_layer_model_proj|ssm_conv1d|"
    r"shortconv\.conv\.weight$|attn_rel_b\.weight$|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)"
)


@dataclass(frozen=True)
class Facts:
    """What rules ask of a model. sharing: queries that read the same keys and values, 0 where there are none."""

    architecture: str
    blocks: int
    experts: int
    sharing: int

    @property
    def large(self) -> bool:
        """Whether llama.cpp calls it a model of 70B."""
        least = LARGE.get((self.architecture, self.blocks))
        return least is not None and self.sharing >= least

    @classmethod
    def of(cls, described: Described) -> Facts:
        """Return the facts in a file's metadata."""

        def number(key: str, default: int) -> int:
            value = described.metadata.get(f"{described.architecture}.{key}", default)
            value = value.value if isinstance(value, Typed) else value
            return int(value[0] if isinstance(value, list) else value)

        heads = number("attention.head_count", 1)
        shared = number("attention.head_count_kv", heads)
        sharing = heads // shared if shared else 0
        return cls(described.architecture, number("block_count", 0), number("expert_count", 0), sharing)


@dataclass(frozen=True)
class Place:
    """Where a tensor is: the place among those of its kind, from 0 on, and how many there are."""

    number: int
    count: int
    facts: Facts


Where = Callable[[Place], bool]
Rules = Mapping[str, tuple[tuple[str, Where], ...]]  # mix -> types, the first that holds is taken


def _everywhere(place: Place) -> bool:
    return True


def _where_shared(place: Place) -> bool:
    return place.facts.sharing >= SHARED_HEADS


def _at_ends_and_every_third(place: Place) -> bool:
    """The first and the last eighth, and every third between."""
    eighth = place.count // 8
    return place.number < eighth or place.number >= 7 * place.count // 8 or (place.number - eighth) % 3 == 2


def _first(count: int) -> Where:
    return lambda place: place.number < count


def _first_share(parts: int) -> Where:
    return lambda place: place.number < place.count // parts


VALUES: Rules = {
    "Q2_K": (("Q4_K", _where_shared), ("Q3_K", _everywhere)),
    "Q2_K_S": (("Q4_K", _where_shared),),
    "Q3_K_M": (("Q5_K", _first(2)), ("Q4_K", _everywhere)),
    "Q3_K_L": (("Q5_K", _everywhere),),
    "IQ4_NL": (("Q5_K", _where_shared),),
    "IQ4_XS": (("Q5_K", _where_shared),),
    "Q4_K_S": (("Q5_K", _first(4)),),
    "Q4_K_M": (("Q6_K", _at_ends_and_every_third),),
    "Q5_K_M": (("Q6_K", _at_ends_and_every_third),),
}
DOWN: Rules = {
    "Q2_K": (("Q3_K", _everywhere),),
    "Q2_K_S": (("Q4_K", _first_share(8)),),
    "Q3_K_M": (("Q5_K", _first_share(16)), ("Q4_K", _everywhere)),
    "Q3_K_L": (("Q5_K", _everywhere),),
    "Q4_0": (("Q4_1", _first_share(8)),),
    "Q5_0": (("Q5_1", _first_share(8)),),
    "Q4_K_S": (("Q5_K", _first_share(8)),),
    "Q4_K_M": (("Q6_K", _at_ends_and_every_third),),
    "Q5_K_M": (("Q6_K", _at_ends_and_every_third),),
}
ATTENTION_OUTPUT: Rules = {
    "Q2_K": (("Q3_K", _everywhere),),
    "Q3_K_M": (("Q4_K", _everywhere),),
    "Q3_K_L": (("Q5_K", _everywhere),),
}
OF_EXPERTS: Rules = dict.fromkeys(
    ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"), (("Q5_K", _everywhere),)
)


def check_mix(name: str) -> str:
    """Return the name of a mix as llama.cpp writes it; raises UsageError where there is none."""
    if name.upper() not in MIXES:
        raise UsageError(f"--like is {name}, which is no mix that quantc knows; choose {', '.join(MIXES)}.")
    return name.upper()


def mixed(tensors: Iterable[FileTensor], described: Described, mix: str) -> list[FileTensor]:
    """Return the tensors of a file in the types that llama.cpp's quantizer would give them; raises UsageError where it
    has rules of its own for an architecture."""
    facts = Facts.of(described)
    if facts.architecture in OWN_RULES:
        raise UsageError(
            f"llama.cpp has other rules for {facts.architecture} than for the rest, which quantc does not know; pass "
            "--size instead of --like."
        )
    ordered = sorted(tensors, key=lambda tensor: (_block(tensor.name), tensor.name))
    tied = all(tensor.name != HEAD for tensor in ordered)
    chosen = _Chooser(mix, facts, sum(_kind(tensor.name) == "values" for tensor in ordered))
    return [replace(t, kind=_fitting(chosen(t, tied), t.shape[-1])) if _quantized(t) else t for t in ordered]


class _Chooser:
    """Types for tensors in their order: those of a kind are counted."""

    def __init__(self, mix: str, facts: Facts, values: int):
        self.mix, self.base, self.facts = mix, MIXES[mix], facts
        self._counts = {"values": values, "down": facts.blocks}
        self._seen = {"values": 0, "down": 0}

    def __call__(self, tensor: FileTensor, tied: bool) -> str:
        if tensor.name == HEAD or (tied and tensor.name in TABLES):
            return self._head(tensor.shape[-1])
        kind = _kind(tensor.name)
        place = self._place(kind, tensor.name)
        experts = self.facts.experts == EXPERTS
        if kind == "values":
            found = _rule(VALUES, self.mix, place) or self.base
            if self.facts.large and found in ("Q3_K", "Q4_K"):
                found = "Q5_K"
            return "Q8_0" if experts else found
        if kind == "keys":
            return "Q8_0" if experts else self.base
        rules = {"down": DOWN, "attention output": OF_EXPERTS if experts else ATTENTION_OUTPUT}.get(kind, {})
        return _rule(rules, self.mix, place) or self.base

    def _head(self, k: int) -> str:
        """Return the type of the head, or of the embedding that is the head too."""
        return "Q8_0" if self.base == "Q8_0" or k % TYPES[self.base].size else "Q6_K"

    def _place(self, kind: str, name: str) -> Place:
        number = self._seen.get(kind, 0)
        self._seen[kind] = number + 1
        if kind == "down" and self.facts.experts > 1:
            number = _block(name)
        return Place(number, self._counts.get(kind, 0), self.facts)


def _rule(rules: Rules, mix: str, place: Place) -> str | None:
    return next((kind for kind, where in rules.get(mix, ()) if where(place)), None)


def _fitting(name: str, k: int) -> BlockType | torch.dtype:
    """Return the type, or the one that is taken where its blocks do not divide rows of k weights."""
    if k % TYPES[name].size:
        name = SMALLER.get(name, name)
    return torch.float16 if k % TYPES[name].size else TYPES[name]


def _kind(name: str) -> str:
    return next((kind for part, kind in KINDS if part in name), "")


def _block(name: str) -> int:
    """Return the number of a tensor's block, -1 for what is outside the blocks."""
    found = NUMBER.search(name)
    return int(found[1]) if found else -1


def _quantized(tensor: FileTensor) -> bool:
    """Return whether llama.cpp rounds a tensor: matrices that are no small parts of a model."""
    rows = math.prod(tensor.shape[:-1])
    return rows > 1 and tensor.name.endswith("weight") and FLOATS.search(tensor.name) is None
