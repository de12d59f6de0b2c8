"""Decode speed: how many tokens a second a model writes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..frontend.source import quiet_transformers
from ..frontend.token_ids import embedding_rows
from ..machine.timing import at_most_threads

PROMPT_TOKENS, NEW_TOKENS, RUNS, THREADS = 32, 64, 3, 2
PROMPT = "The river rises in the hills, runs past the old mill and the market town, and meets the sea. " * 4


def measure_decode_speed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return tokens per second of greedy `generate` in the model's own dtype: batch 1, the best of three runs.

    A run is 64 new tokens after a prompt of 32, reading the prompt included; the end-of-text token does not
    stop it. At most two CPU threads work, so that figures from different machines are of the same kind.
    """
    prompt = torch.tensor([tokenizer(PROMPT).input_ids[:PROMPT_TOKENS]], device=model.device)
    prompt %= embedding_rows(model)  # which tokens they are does not matter, only that the model knows them
    with at_most_threads(THREADS), quiet_transformers():
        return NEW_TOKENS / min(_time_run(model, prompt) for _ in range(RUNS))


def _time_run(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    generate: Any = model.generate
    start = time.perf_counter()
    output = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
    )
    output.cpu()  # waits for a GPU to finish
    return time.perf_counter() - start
