from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch

from quantc.errors import CalibrationError, UsageError
from quantc.evaluation.windows import Window, check_context, leading_bos, make_windows
from tests.families import build
from tests.word_tokenizer import BOS, UNKNOWN, make_tokenizer, to_text

TEXT = [3 + (7 * i) % 150 for i in range(100)]


def scored_tokens(window: Window) -> list[int]:
    return window.tokens[-window.scored :].tolist()


def test_one_text_is_cut_into_full_windows() -> None:
    windows = make_windows(make_tokenizer(adds_bos=False), [to_text(TEXT)], context=16)
    assert [window.tokens.tolist() for window in windows] == [TEXT[i : i + 16] for i in range(0, 96, 16)]
    assert [window.scored for window in windows] == [15] * 6
    assert windows[0].tokens.dtype == torch.int64


def test_windows_start_with_bos_where_the_tokenizer_adds_it() -> None:
    windows = make_windows(make_tokenizer(adds_bos=True), [to_text(TEXT)], context=16)
    assert [window.tokens.tolist() for window in windows] == [[BOS, *TEXT[i : i + 15]] for i in range(0, 90, 15)]
    assert [window.scored for window in windows] == [15] * 6


def test_text_of_exactly_one_window() -> None:
    assert len(make_windows(make_tokenizer(adds_bos=False), [to_text(TEXT[:16])], context=16)) == 1
    assert len(make_windows(make_tokenizer(adds_bos=True), [to_text(TEXT[:15])], context=16)) == 1


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("stride", [1, 5, 15])
def test_overlapping_windows_score_every_token_once(stride: int, adds_bos: bool) -> None:
    windows = make_windows(make_tokenizer(adds_bos=adds_bos), [to_text(TEXT)], context=16, stride=stride)
    scored = [token for window in windows for token in scored_tokens(window)]
    unseen = 0 if adds_bos else 1  # the first token has nothing to be predicted from
    assert scored == TEXT[unseen : unseen + len(scored)]
    assert 100 - unseen - len(scored) < stride
    assert {len(window.tokens) for window in windows} == {16}


def test_stride_is_the_context_unless_told() -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    default, told = (make_windows(tokenizer, [to_text(TEXT)], 16, stride) for stride in (None, 16))
    assert [window.tokens.tolist() for window in default] == [window.tokens.tolist() for window in told]
    assert all(len(set(a.tokens.tolist()) & set(b.tokens.tolist())) == 0 for a, b in pairwise(default))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_stories_are_windows_of_their_own(adds_bos: bool) -> None:
    stories = [to_text(TEXT[:5]), to_text(TEXT[5:40]), "", to_text(TEXT[40:42])]
    windows = make_windows(make_tokenizer(adds_bos=adds_bos), stories, context=16)
    bos = [BOS] * adds_bos
    expected = [bos + TEXT[:5], (bos + TEXT[5:40])[:16], bos + TEXT[40:42]]
    assert [window.tokens.tolist() for window in windows] == expected
    assert [window.scored for window in windows] == [len(tokens) - 1 for tokens in expected]


def test_stories_of_one_token_predict_only_after_bos() -> None:
    stories = ["w5", "w6 w7"]
    assert len(make_windows(make_tokenizer(adds_bos=False), stories, context=16)) == 1
    assert len(make_windows(make_tokenizer(adds_bos=True), stories, context=16)) == 2


def test_limit_keeps_the_first_windows() -> None:
    tokenizer = make_tokenizer(adds_bos=False)
    windows = make_windows(tokenizer, [to_text(TEXT)], context=16, limit=2)
    assert [window.tokens.tolist() for window in windows] == [TEXT[:16], TEXT[16:32]]
    assert len(make_windows(tokenizer, [to_text(TEXT)], context=16, limit=50)) == 6
    assert len(make_windows(tokenizer, ["w5 w6"] * 3, context=16, limit=2)) == 2


def test_a_long_text_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_windows(make_tokenizer(adds_bos=False), [to_text(TEXT)], context=16)
    assert not caplog.records


def test_leading_bos_is_the_tokenizers_own_habit() -> None:
    assert leading_bos(make_tokenizer(adds_bos=True)) == [BOS]
    assert leading_bos(make_tokenizer(adds_bos=False)) == []
    nameless = make_tokenizer(adds_bos=False)
    nameless.bos_token = None
    assert leading_bos(nameless) == []
    assert nameless("x").input_ids == [UNKNOWN]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "--context is 1, but a prediction needs at least 2 tokens; pass 2 or more."),
        (
            {"context": 16, "stride": 0},
            "--stride is 0, but windows of 16 tokens can start 1 to 16 tokens apart",
        ),
        (
            {"context": 16, "stride": 17},
            "--stride is 17, but windows of 16 tokens can start 1 to 16 tokens apart",
        ),
        ({"context": 16, "limit": 0}, "--windows is 0, but at least one window is needed; pass 1 or more."),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_windows(make_tokenizer(adds_bos=False), [to_text(TEXT)], **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(("adds_bos", "needed"), [(False, 128), (True, 127)])
def test_text_too_short(adds_bos: bool, needed: int) -> None:
    with pytest.raises(CalibrationError) as caught:
        make_windows(make_tokenizer(adds_bos=adds_bos), [to_text(TEXT)], context=128)
    assert str(caught.value) == (
        f"the evaluation text has 100 tokens, but a single window of --context 128 needs {needed} of them; "
        "pass a longer text or a smaller --context."
    )


def test_stories_too_short() -> None:
    with pytest.raises(CalibrationError) as caught:
        make_windows(make_tokenizer(adds_bos=False), ["w5", "w6", ""], context=16)
    assert str(caught.value).startswith("no document of the evaluation text has two tokens")


def test_context_beyond_the_models_positions() -> None:
    model = build("llama")
    check_context(model, 128)
    with pytest.raises(UsageError) as caught:
        check_context(model, 129)
    assert str(caught.value) == (
        "--context is 129 tokens, but the model has only 128 positions; pass --context 128 or less."
    )


@pytest.mark.parametrize(("name", "limited"), [("gpt2", True), ("bloom", False)])
def test_context_of_other_families(name: str, limited: bool) -> None:
    if limited:
        with pytest.raises(UsageError, match="only 128 positions"):
            check_context(build(name), 1000)
    else:  # its attention biases reach any distance
        check_context(build(name), 1000)
