"""Lets a packed checkpoint write a short text: `python examples/say.py CHECKPOINT "PROMPT"`."""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer

import quantc


def main() -> None:
    folder, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = quantc.load(folder)
    turn = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        written = model.generate(**tokens, max_new_tokens=80, do_sample=False)
    print(f"\n{prompt}\n\n{tokenizer.decode(written[0, tokens.input_ids.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
