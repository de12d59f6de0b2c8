"""Chat data: rows as people have them become conversations, and those become tokens through the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from quantc.calib_data import Conversation, Document, load_documents
from quantc.calibration.tokens import tokenize_documents
from quantc.errors import CalibrationError
from quantc.evaluation.text import read_text
from quantc.evaluation.windows import make_windows
from quantc.frontend.token_ids import render
from tests.word_tokenizer import BOS, EOS, make_tokenizer

PLAIN = "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
)
TALK = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]
SYSTEM = {"role": "system", "content": "w9"}


def tokenizer(template: str | None = PLAIN, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    made = make_tokenizer(adds_bos=adds_bos)
    made.add_tokens([AddedToken(f"<|{role}|>", special=True) for role in ("system", "user", "assistant")])
    made.chat_template = template
    return made


def said(*messages: dict[str, Any]) -> Conversation:
    return Conversation(tuple(messages))


def load(folder: Path, *rows: Any, notes: list[str] | None = None) -> list[Document]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_documents(str(file), notes=notes)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [SYSTEM, *TALK, *TALK]}, said(SYSTEM, *TALK, *TALK)),
        ({"messages": TALK, "system": "w9"}, said(SYSTEM, *TALK)),
        ({"messages": json.dumps(TALK)}, said(*TALK)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "w3"}, {"text": " w4"}]}]}, said(TALK[0])),
        ({"conversations": [{"from": "human", "value": "w3 w4"}, {"from": "gpt", "value": "w5"}]}, said(*TALK)),
        ({"conversations": [{"from": "human", "value": "w3 w4"}], "system": "w9"}, said(SYSTEM, TALK[0])),
        ({"conversation": TALK}, said(*TALK)),
        ({"prompt": "w3 w4", "completion": "w5"}, said(*TALK)),
        ({"prompt": "w3 w4", "response": "w5", "system": "w9"}, said(SYSTEM, *TALK)),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, said(*TALK)),
        ({"instruction": "w3", "input": "w4", "output": "w5"}, said({"role": "user", "content": "w3\n\nw4"}, TALK[1])),
        ({"instruction": "w3 w4", "input": "", "output": "w5"}, said(*TALK)),
        ({"instruction": "w3 w4", "response": "w5"}, said(*TALK)),
        ({"chosen": TALK, "rejected": TALK[:1]}, said(*TALK)),
        ({"prompt": "w3 w4", "chosen": "w5", "rejected": "w6"}, said(*TALK)),
        ({"prompt": "w3 w4", "chosen": TALK[1:], "rejected": []}, said(*TALK)),
        ({"prompt": "w3 w4", "chosen": TALK, "rejected": []}, said(*TALK)),
        ({"chosen": "Human: w3", "rejected": "w6"}, "Human: w3"),
        ({"text": "w3", "messages": TALK}, "w3"),
        ({"text": None, "messages": TALK}, said(*TALK)),
        ({"text": "", "messages": TALK}, said(*TALK)),
        ({"prompt": "w3 w4", "prompt_id": "7", "messages": TALK}, said(*TALK)),
        (
            {
                "messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
                "tools": "[1]",
            },
            Conversation((TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}), (1,)),
        ),
    ],
)
def test_rows_are_read_in_every_usual_shape(tmp_path: Path, row: Any, wanted: Document) -> None:
    assert load(tmp_path, row) == [wanted]
    assert read_text(str(tmp_path / "rows.jsonl")) == [wanted]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "w3"}, 'has "messages" that are no list of messages'),
        ({"messages": "[w3"}, 'has a "messages" that is no JSON (Expecting value'),
        ({"messages": [3]}, 'has "messages" that are no list of messages'),
        ({"messages": [{"content": "w3"}]}, 'has "messages" with a message that does not say who speaks'),
        ({"messages": [{"role": "user", "content": 3}]}, 'has "messages" with a message whose content is of type int'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            'has "messages" with content that is no text',
        ),
        ({"prompt": 3, "completion": "w5"}, 'has a "prompt" of type int'),
        ({"question": "w3"}, "has none of the fields that are read but 'question'"),
    ],
)
def test_a_row_that_is_none_of_them_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path, {"text": "w3"}, row)
    assert f"{tmp_path / 'rows.jsonl'} line 2 {message}" in str(caught.value)
    assert str(caught.value).endswith("correct or delete that line.")


NOTHING: list[Any] = [
    None,
    {},
    {"text": None},
    {"messages": []},
    {"messages": None},
    {"instruction": None, "output": "a"},
]


@pytest.mark.parametrize("row", NOTHING)
def test_a_row_that_says_nothing_is_skipped_and_counted(tmp_path: Path, row: Any) -> None:
    notes: list[str] = []
    assert load(tmp_path, {"text": "w3"}, row, {"messages": TALK}, notes=notes) == ["w3", said(*TALK)]
    assert notes == [
        f"calibration file {tmp_path / 'rows.jsonl'}: line 2 says nothing; 1 of 3 rows were skipped for that"
    ]


def test_many_rows_that_say_nothing_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "w3"}] * 17 + [{"text": None}] * 2
    with pytest.raises(CalibrationError) as caught:
        load(tmp_path, *rows)
    assert "has 2 of 19 rows that say nothing, the first in line 18; up to a tenth are skipped" in str(caught.value)
    assert load(tmp_path, *rows, {"text": "w3"}) == ["w3"] * 18


def test_turns_go_through_the_chat_template_with_special_tokens() -> None:
    made = tokenizer()
    marks = [made.convert_tokens_to_ids(f"<|{role}|>") for role in ("system", "user", "assistant")]
    (window,) = make_windows(made, [said(SYSTEM, *TALK, *TALK)], context=17)
    turns = [marks[1], 3, 4, EOS, marks[2], 5, EOS]
    assert window.tokens.tolist() == [marks[0], 9, EOS, *turns, *turns]


def test_calibration_joins_conversations_without_a_second_end() -> None:
    made = tokenizer()
    tokens = tokenize_documents(made, [said(*TALK), "w7", said(*TALK)], samples=1, seq_len=16, seed=0)
    user, assistant = (made.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant"))
    turns = [user, 3, 4, EOS, assistant, 5, EOS]
    assert tokens.tolist() == [[*turns, 7, EOS, *turns]]


def test_bos_of_template_and_tokenizer_are_one() -> None:
    made = tokenizer("<s> " + PLAIN, adds_bos=True)
    user = made.convert_tokens_to_ids("<|user|>")
    for document in (said(TALK[0]), [said(TALK[0]), said(TALK[0])]):
        documents = document if isinstance(document, list) else [document]
        assert make_windows(made, documents, context=5)[0].tokens.tolist() == [BOS, user, 3, 4, EOS]
    tokens = tokenize_documents(made, [said(TALK[0])], samples=1, seq_len=5, seed=0)
    assert tokens.tolist() == [[BOS, user, 3, 4, EOS]]


@pytest.mark.parametrize("seed", range(5))
def test_no_window_starts_with_two_bos(seed: int) -> None:
    """The BOS of a conversation that comes later stays: with some models it is the mark of a turn."""
    made = tokenizer("<s> " + PLAIN, adds_bos=True)
    tokens = tokenize_documents(made, [said(TALK[0])] * 9, samples=7, seq_len=8, seed=seed)
    assert (tokens[:, 0] == BOS).all()
    assert (tokens[:, 1] != BOS).all()
    assert (tokens[:, 1:] == BOS).any(dim=1).all()


def test_bos_that_only_the_template_writes_stays() -> None:
    made = tokenizer("<s> " + PLAIN)
    tokens = tokenize_documents(made, [said(TALK[0])] * 2, samples=1, seq_len=10, seed=0)
    assert tokens[0].tolist().count(BOS) == 2


def test_a_system_prompt_that_the_template_refuses_is_the_beginning_of_the_first_turn() -> None:
    folded = {"role": "user", "content": "w9\n\nw3 w4"}
    assert render(tokenizer(NO_SYSTEM), said(SYSTEM, *TALK)) == render(tokenizer(PLAIN), said(folded, TALK[1]))
    assert "<|system|>" in render(tokenizer(PLAIN), said(SYSTEM, *TALK))


def test_a_conversation_that_the_template_refuses_is_quoted() -> None:
    with pytest.raises(CalibrationError) as caught:
        render(tokenizer("{{ raise_exception('roles must alternate') }}"), said(TALK[0], TALK[0]))
    assert str(caught.value) == (
        "the tokenizer's chat template refuses a conversation (roles must alternate): user, user speak in that order, "
        "and it begins with 'w3 w4'; correct or delete that row, or pass rows with a string \"text\"."
    )


def test_a_tokenizer_without_a_template_says_what_is_needed() -> None:
    with pytest.raises(CalibrationError) as caught:
        tokenize_documents(tokenizer(None), [said(*TALK)], samples=1, seq_len=8, seed=0)
    assert str(caught.value) == (
        "the text holds conversations, but the tokenizer has no chat template to write them with; put the model's "
        'chat_template.jinja into its folder, or pass rows with a string "text".'
    )


@pytest.mark.parametrize(("samples", "noted"), [(4, False), (5, True)])
def test_windows_that_are_nearly_the_same_are_noted(samples: int, noted: bool) -> None:
    notes: list[str] = []
    text = " ".join(["w3"] * 15)
    tokens = tokenize_documents(tokenizer(), [text], samples=samples, seq_len=8, seed=0, notes=notes)
    assert tokens.shape == torch.Size([samples, 8])
    note = (
        f"{samples} calibration windows of 8 tokens come from a text of 16 tokens, so that they are nearly the same; a "
        "longer text or fewer --samples would do better"
    )
    assert notes == ([note] if noted else [])
