"""Logits by mlx-lm on the CPU, in the dtype of the files."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from answer import answer
from mlx_lm.utils import load_model


def logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    model, _ = load_model(Path(folder))
    return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    answer(logits)
