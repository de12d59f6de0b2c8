"""Calibration tokens: windows of the text, the same for the same seed."""

from __future__ import annotations

import pytest
import torch

from quantc.calibration.tokens import generate_tokens, tokenize_documents
from quantc.errors import CalibrationError
from tests.families import VOCAB, build
from tests.word_tokenizer import BOS, EOS, make_tokenizer, to_text

FIRST, SECOND = list(range(3, 60)), list(range(60, 100))
STREAM = [*FIRST, EOS, *SECOND, EOS]


def windows(samples: int, seq_len: int, seed: int = 0, adds_bos: bool = False) -> list[list[int]]:
    documents = [to_text(FIRST), to_text(SECOND)]
    return tokenize_documents(make_tokenizer(adds_bos=adds_bos), documents, samples, seq_len, seed).tolist()


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("samples", [1, 2, 5, 40])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_every_sample_is_a_window_of_the_text(samples: int, seed: int, adds_bos: bool) -> None:
    found = windows(samples, 20, seed, adds_bos)
    assert len(found) == samples
    for row in found:
        assert len(row) == 20
        body = row[1:] if adds_bos else row
        assert not adds_bos or row[0] == BOS
        start = STREAM.index(body[0]) if body[0] != EOS else None
        assert start is None or STREAM[start : start + len(body)] == body


def test_samples_are_spread_from_the_first_token_to_the_last() -> None:
    found = windows(4, 20)
    assert found[0] == STREAM[:20]
    assert found[-1] == STREAM[-20:]
    assert len({tuple(row) for row in found}) == 4


def test_the_seed_decides() -> None:
    assert windows(5, 20, seed=3) == windows(5, 20, seed=3)
    assert windows(5, 20, seed=3) != windows(5, 20, seed=4)


def test_a_text_of_exactly_one_window_will_do() -> None:
    assert windows(3, len(STREAM)) == [STREAM] * 3


@pytest.mark.parametrize(("adds_bos", "needs"), [(False, 120), (True, 119)])
def test_a_shorter_text_is_refused(adds_bos: bool, needs: int) -> None:
    with pytest.raises(CalibrationError) as caught:
        windows(1, 120, adds_bos=adds_bos)
    assert str(caught.value) == (
        f"the calibration text has 99 tokens, but one sample needs {needs}; give a longer text or a smaller --seq-len."
    )


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the calibration text has 1 tokens, but one sample needs 8"):
        tokenize_documents(make_tokenizer(adds_bos=False), [""], 1, 8, 0)


@pytest.mark.parametrize("first", [[], [BOS]])
def test_a_model_writes_its_own_text_by_seed(first: list[int]) -> None:
    model = build("llama")
    state = torch.random.get_rng_state()
    one = generate_tokens(model, 3, 12, 5, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.shape == (3, 12)
    assert one.dtype == torch.int64
    assert 0 <= int(one.min()) <= int(one.max()) < VOCAB
    assert not first or one[:, 0].tolist() == [BOS] * 3
    assert torch.equal(one, generate_tokens(model, 3, 12, 5, first))
    assert not torch.equal(one, generate_tokens(model, 3, 12, 6, first))
