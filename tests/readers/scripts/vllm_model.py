"""A model in vLLM's CPU build, in float32, in one process or in several."""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

import dense_kernel
import online_rotation
from vllm import LLM, SamplingParams

MOST_TOKENS = 128


def open_model(folder: str, logprobs: int) -> LLM:
    """Return the model; logprobs: the most of them that it is asked for at a token."""
    dense_kernel.install()
    online_rotation.install()
    return LLM(
        model=folder, dtype="float32", enforce_eager="COMPILE" not in os.environ, max_model_len=MOST_TOKENS,
        max_num_seqs=2, max_logprobs=logprobs, skip_tokenizer_init=True, disable_log_stats=True,
        tensor_parallel_size=int(os.environ.get("PROCESSES", "1")),
    )  # fmt: skip


def ask(model: LLM, tokens: list[int], count: int, logprobs: int | None = None):
    """Return what the model makes of a prompt, with the `count` likeliest tokens after it."""
    asked = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, prompt_logprobs=logprobs, logprobs=logprobs
    )
    (found,) = model.generate({"prompt_token_ids": tokens}, asked, use_tqdm=False)
    return found
