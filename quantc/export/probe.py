"""Tokens that another runtime and quantc compute logits of, and how far the two are apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from ..frontend.auto import read_tokenizer
from ..frontend.token_ids import leading_bos
from ..machine.memory import available_bytes
from ..units import size

PROBE = (
    "The harbour filled up with mud because every tide carried silt in, and 12,480 tonnes of it stayed.\n\n"
    "def depth(metres: float) -> str:\n    return f'{metres:.2f} m'\n\n"
    "Im Jahr 1897 wurde der Hafen ausgebaggert; l'année suivante, il était déjà plein. Вода была мутной, 港口很浅。"
)
TOKENS = 96
ROOM = 0.8  # the share of free memory that weights may take: the rest is for activations and logits


@dataclass(frozen=True)
class Agreement:
    """How far another runtime's logits are from quantc's over the tokens of a probe.

    kl: mean KL(quantc || other) in nats. error: relative error of centred logits. same_top: share of positions
    where both find the same token likeliest. tokens: how many. tokenizer: whether the other cuts the probe into the
    same tokens, None where it was not asked.
    """

    kl: float
    error: float
    same_top: float
    tokens: int
    tokenizer: bool | None


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a folder, None where there is none."""
    try:
        return read_tokenizer(folder)
    except ModelError:
        return None


def probe_tokens(tokenizer: PreTrainedTokenizerBase | None, config: Any) -> torch.Tensor:
    """Return tokens (T,) of a text, at most as many as the model reads; drawn at random where there is no tokenizer."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    count = min([TOKENS, *(limit for limit in limits if limit)])
    if tokenizer is not None:
        tokens = leading_bos(tokenizer) + tokenizer(PROBE, add_special_tokens=False).input_ids
        if len(tokens) > 1 and max(tokens) < config.vocab_size:
            return torch.tensor(tokens[:count])
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits (T, V), float32, of tokens (T,)."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0].float()
    return found


def short_of_memory(needed: int) -> str | None:
    """Return why logits cannot be compared in this many bytes of memory, None where they can."""
    free = available_bytes()
    if needed <= ROOM * free:
        return None
    return f"comparing logits needs {size(needed)} of memory, and {size(free)} are free"


def measure(expected: torch.Tensor, found: torch.Tensor, same_tokens: bool | None) -> Agreement:
    """Return how far logits (T, V) are from the expected ones."""
    expected, found = expected.double(), found[:, : expected.shape[1]].double()
    log_p, log_q = expected.log_softmax(1), found.log_softmax(1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    centred, other = (logits - logits.mean(1, keepdim=True) for logits in (expected, found))
    error = float((centred - other).norm() / centred.norm())
    same = float((expected.argmax(1) == found.argmax(1)).double().mean())
    return Agreement(kl, error, same, len(expected), same_tokens)
