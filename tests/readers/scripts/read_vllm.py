"""Logits by vLLM's CPU build, in float32: of a prompt, which it is asked for with all of the vocabulary."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

import numpy as np
from answer import answer
from dense_kernel import install
from vllm import LLM, SamplingParams

AS_SOON = int(os.environ.get("TOKENS_TO_GENERATE", "1"))


def logits(folder: str, tokens: np.ndarray) -> np.ndarray:
    """Return logits, but for a constant in each row; what was generated is written to generated.json in the folder."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    count = config["vocab_size"]
    model = LLM(
        model=folder, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=2, max_logprobs=count,
        skip_tokenizer_init=True, disable_log_stats=True,
    )  # fmt: skip
    asked = SamplingParams(
        temperature=0, max_tokens=AS_SOON, ignore_eos=True, detokenize=False, prompt_logprobs=count, logprobs=count
    )
    (found,) = model.generate({"prompt_token_ids": tokens.tolist()}, asked, use_tqdm=False)
    (said,) = found.outputs
    rows = [*found.prompt_logprobs[1:], said.logprobs[0]]
    return np.array([[row[token].logprob for token in range(count)] for row in rows])


if __name__ == "__main__":
    install()
    answer(logits)
