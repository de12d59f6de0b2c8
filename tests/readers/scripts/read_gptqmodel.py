"""Logits by GPTQModel's kernels in PyTorch, on the CPU."""

import numpy as np
import torch
from answer import answer
from gptqmodel import BACKEND, GPTQModel


def logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH).model.eval()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()


if __name__ == "__main__":
    answer(logits)
