"""A GGUF file that llama.cpp runs, with as much of a transformers model's face as evaluation looks at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ..frontend.gguf import GgufSource
from ..machine.compute_dtype import Choice
from . import llama_cpp

LEAST_CONTEXT = 128  # decode speed is measured on 96 tokens
CHOICE = Choice(torch.float32, "by llama.cpp itself, which rounds activations to 8 bits")


def refusal(dtype_given: bool, device: str) -> str | None:
    """Return why a GGUF file is not measured by llama.cpp, None where it is."""
    if dtype_given:
        return "a dtype was given, which llama.cpp chooses itself"
    if device != "cpu":
        return f"llama.cpp is asked on the CPU alone, not on {device}"
    return llama_cpp.missing()


class LlamaCppModel:
    """Logits and greedy continuations of a GGUF file, computed by llama.cpp on the CPU.

    config and embedding are those of the skeleton that transformers builds from the same file. context: the most tokens
    that are read at once.
    """

    device = torch.device("cpu")

    def __init__(self, source: GgufSource, context: int):
        self._skeleton = source.model
        self.config = source.model.config
        self._opened = llama_cpp.LlamaCpp(source.path, max(context, LEAST_CONTEXT))

    def get_input_embeddings(self) -> Any:
        """Return the skeleton's embedding, whose weights were never read."""
        return self._skeleton.get_input_embeddings()

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Return an object with logits (1, T, V) for tokens (1, T)."""
        return SimpleNamespace(logits=self._opened.logits(input_ids[0])[None])

    def generate(self, prompt: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        """Return the prompt (1, T) and its greedy continuation; the end of a text does not stop it."""
        self._opened.use_threads(torch.get_num_threads())
        tokens = prompt[0].tolist()
        last = self._opened.logits(prompt[0])[-1]
        for _step in range(max_new_tokens):
            tokens.append(int(last.argmax()))
            last = self._opened.more_logits(torch.tensor(tokens[-1:]), len(tokens) - 1)[-1]
        return torch.tensor([tokens])

    def close(self) -> None:
        """Free the memory that llama.cpp holds; the model cannot be used afterwards."""
        self._opened.close()
