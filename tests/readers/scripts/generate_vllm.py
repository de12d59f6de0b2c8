"""The tokens that vLLM generates after a prompt, the likeliest each time, in one row."""

from __future__ import annotations

import numpy as np
from answer import answer
from vllm_model import ask, open_model

COUNT = 64


def generated(folder: str, tokens: np.ndarray) -> np.ndarray:
    return np.array([ask(open_model(folder, 1), tokens.tolist(), COUNT).outputs[0].token_ids])


if __name__ == "__main__":
    answer(generated)
