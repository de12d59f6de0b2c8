"""Decode speed of a packed checkpoint next to its original in transformers, and whether its text is right.

Speed, by the measuring protocol: 64 new tokens after a prompt of 32, batch 1, greedy, two threads. The models
take turns in one process (A B C D, A B C D, ...), so that other work on the machine slows all of them;
the best turn of each counts.

Text: 100 greedy tokens in float32 through the reference kernel, against those of the same checkpoint with
every packed weight replaced by its dequantized float32 weight. They should be the same; where they are not,
the first difference is shown with the margin by which the dequantized model preferred its choice.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import quantc
from benchmarks.common import describe, machine, markdown, write_json
from quantc.evaluation.decode_speed import NEW_TOKENS, PROMPT, PROMPT_TOKENS, THREADS
from quantc.frontend import open_model
from quantc.frontend.source import quiet_transformers
from quantc.kernels import registry
from quantc.kernels.reference import REFERENCE
from quantc.machine.timing import at_most_threads
from quantc.runtime.modules import unpack

TEXT_TOKENS = 100
PROMPTS = (
    "Once upon a time, there was a small village at the foot of a mountain.",
    "The three most important inventions of the last century are",
    "One day a girl named Lily found a",
    "def fibonacci(n):",
    "Dear Sir, I am writing to you about",
)


def reference_only() -> AbstractContextManager[Any]:
    """Inside, packed weights that run for the first time choose the reference kernel."""
    return mock.patch.object(registry, "KERNELS", (REFERENCE,))


def continue_text(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The greedy continuation (count,) of a prompt (1, T); the end-of-text token does not stop it."""
    generate: Any = model.generate
    output = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
    )
    return output[0, prompt.shape[1] :]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, limit: int | None = None) -> torch.Tensor:
    return torch.tensor([tokenizer(text).input_ids[:limit]])


def load_contestants(original: str, checkpoint: Path) -> dict[str, PreTrainedModel]:
    source = open_model(original)
    return {
        "original, float32": source.load_whole(torch.float32),
        "original, bfloat16": source.load_whole(torch.bfloat16),
        "packed, bfloat16": quantc.load(checkpoint, dtype=torch.bfloat16),
        "packed, float32, reference kernel": quantc.load(checkpoint, dtype=torch.float32),
    }


def measure_speed(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, turns: int
) -> dict[str, float]:
    """Tokens per second of each model, the best of its turns; a first turn that does not count warms up."""
    prompt = encode(tokenizer, PROMPT, PROMPT_TOKENS)
    best = dict.fromkeys(models, 0.0)
    for turn in range(turns + 1):
        for name, model in models.items():
            start = time.perf_counter()
            continue_text(model, prompt, NEW_TOKENS)
            if turn:
                best[name] = max(best[name], NEW_TOKENS / (time.perf_counter() - start))
    return best


def compare_text(
    packed: PreTrainedModel, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> dict[str, Any]:
    """One prompt: at which new token the two texts part, if they do, and how near the choice was."""
    prompt = encode(tokenizer, text)
    found = continue_text(packed, prompt, TEXT_TOKENS)
    expected = continue_text(dense, prompt, TEXT_TOKENS)
    different = (found != expected).nonzero()
    row = {"prompt": text, "tokens": TEXT_TOKENS, "identical": not len(different)}
    if len(different):
        at = int(different[0])
        logits = dense(input_ids=torch.cat([prompt[0], expected[:at]])[None]).logits[0, -1]
        row |= {"first_difference": at, "margin": float(logits[expected[at]] - logits[found[at]])}
    return row


def show_speed(speed: dict[str, float]) -> None:
    print(markdown([
        {
            "model": name,
            "tokens/s": f"{value:.1f}",
            "of float32": f"{value / speed['original, float32']:.2f}",
            "of bfloat16": f"{value / speed['original, bfloat16']:.2f}",
        }
        for name, value in speed.items()
    ]))  # fmt: skip


def show_text(rows: list[dict[str, Any]]) -> None:
    same = sum(row["identical"] for row in rows)
    print(f"\nGreedy text of {TEXT_TOKENS} tokens as the dequantized model's: {same} of {len(rows)} prompts.")
    for row in rows:
        if not row["identical"]:
            at, margin = row["first_difference"], row["margin"]
            print(f"{row['prompt']!r}: new token {at} differs; its logit was ahead by {margin:.3g}.")


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("original", help="the unquantized model, as `quantc quantize` takes it")
    parser.add_argument("checkpoint", type=Path, help="the checkpoint that quantc made from it")
    parser.add_argument("--turns", type=int, default=3, help="timed turns of each model")
    parser.add_argument("--out", type=Path, help="result file")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    tokenizer = open_model(args.original).tokenizer
    models = load_contestants(args.original, args.checkpoint)
    packed = models["packed, float32, reference kernel"]
    with at_most_threads(THREADS), quiet_transformers():
        with reference_only():  # the kernel is chosen, and kept, the first time a weight is used
            continue_text(packed, encode(tokenizer, PROMPT, PROMPT_TOKENS), 1)
        speed = measure_speed(models, tokenizer, args.turns)
        show_speed(speed)
        dense: Any = unpack(quantc.load(args.checkpoint, dtype=torch.float32), torch.float32)
        rows = [compare_text(packed, dense, tokenizer, text) for text in PROMPTS]
        show_text(rows)
    if args.out:
        names = {"original": Path(args.original).name, "checkpoint": args.checkpoint.name}
        write_json(args.out, {**names, "tokens_per_second": speed, "text": rows, "machine": machine()})


if __name__ == "__main__":
    main()
