"""Logits by mlx-lm on the CPU, in float32: there it adds up products in the dtype of the files, float16 too.

Of SmolLM2 in 4 bits float16 sums alone are a relative error of 0.08, bit by bit what adding in float16 gives.
"""

from pathlib import Path

import mlx.core as mx
import numpy as np
from answer import answer
from mlx_lm.utils import load_model


def logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens)[None])[0])


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    answer(logits)
