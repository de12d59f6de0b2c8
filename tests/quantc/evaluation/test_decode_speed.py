from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from quantc.evaluation import decode_speed
from quantc.evaluation.decode_speed import measure_decode_speed
from tests.families import build
from tests.word_tokenizer import make_tokenizer


def watch(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The outputs of `generate`, as they come."""
    outputs: list[torch.Tensor] = []
    generate: Any = model.generate

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        outputs.append(generate(*args, **options))
        assert torch.get_num_threads() <= 2
        return outputs[-1]

    monkeypatch.setattr(model, "generate", recorded)
    return outputs


@pytest.mark.parametrize("adds_bos", [False, True])
def test_runs_are_64_tokens_after_32_and_greedy(adds_bos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.generation_config.update(do_sample=True, temperature=5.0)  # must not count
    outputs = watch(model, monkeypatch)
    assert measure_decode_speed(model, make_tokenizer(adds_bos=adds_bos)) > 0
    assert [tuple(output.shape) for output in outputs] == [(1, 96)] * 3
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_end_of_text_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build("llama"), make_tokenizer(adds_bos=True)
    outputs = watch(model, monkeypatch)
    measure_decode_speed(model, tokenizer)
    model.generation_config.eos_token_id = outputs[0][0, 32:].unique().tolist()  # all it likes to say
    measure_decode_speed(model, tokenizer)
    assert [output.shape[1] for output in outputs] == [96] * 6


def test_speed_is_that_of_the_best_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 8.0])
    monkeypatch.setattr(decode_speed, "_time_run", lambda *_: next(seconds))
    assert measure_decode_speed(build("llama"), make_tokenizer(adds_bos=True)) == 32.0
