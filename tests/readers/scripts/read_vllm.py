"""Logits by vLLM, but for a constant in each row: it is asked for all of the vocabulary at each token of the prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from answer import answer
from vllm_model import ask, open_model


def logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    count = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["vocab_size"]
    found = ask(open_model(folder, count), tokens.tolist(), 1, count)
    rows = [*found.prompt_logprobs[1:], found.outputs[0].logprobs[0]]
    return np.array([[row[token].logprob for token in range(count)] for row in rows])


if __name__ == "__main__":
    answer(logits)
