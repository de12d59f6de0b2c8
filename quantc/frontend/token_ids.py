"""Documents to tokens; conversations go through the tokenizer's chat template, as the model met them in training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calib_data import Conversation, Document
from ..errors import CalibrationError

ENDING = 3  # tokens at a conversation's end among which a template puts EOS, often before a line end


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [bos_token_id] where the tokenizer starts every text with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x").input_ids[:1] == [bos] else []


def tokenize(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """Return the tokens of a document without special tokens, but for those that the chat template writes.

    Raises CalibrationError where a conversation finds no template, or one that refuses it.
    """
    text = render(tokenizer, document) if isinstance(document, Conversation) else document
    # verbose=False: a whole text is longer than the model's context on purpose, and needs no warning.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def without_first(tokens: list[int], first: list[int]) -> list[int]:
    """Return tokens without `first` at their beginning, which a template may write and windows have anyway."""
    return tokens[len(first) :] if first and tokens[: len(first)] == first else tokens


def ends(tokenizer: PreTrainedTokenizerBase, document: Document, tokens: list[int]) -> bool:
    """Return whether a document's tokens end with EOS already, as conversations do by most templates."""
    return isinstance(document, Conversation) and tokenizer.eos_token_id in tokens[-ENDING:]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Return a conversation as the chat template writes it; raises CalibrationError.

    A template that refuses system prompts gets them as the beginning of what the user says first.
    """
    if not tokenizer.chat_template:
        raise CalibrationError(
            "the text holds conversations, but the tokenizer has no chat template to write them with; put the model's "
            'chat_template.jinja into its folder, or pass rows with a string "text".'
        )
    messages = [dict(message) for message in conversation.messages]
    try:
        return _apply(tokenizer, messages, conversation)
    except Exception as error:  # a template is a program, and may fail in any way
        folded = _fold_system(messages)
        if folded is None:
            raise _refused(messages, error) from error
    try:
        return _apply(tokenizer, folded, conversation)
    except Exception as error:
        raise _refused(messages, error) from error


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], conversation: Conversation) -> str:
    tools: Any = None if conversation.tools is None else list(conversation.tools)
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Return messages with the system prompt in front of the first user's words; None without it or a user."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _refused(messages: list[dict[str, Any]], error: Exception) -> CalibrationError:
    roles = ", ".join(str(message["role"]) for message in messages[:6])
    begin = messages[0]["content"][:60]
    return CalibrationError(
        f"the tokenizer's chat template refuses a conversation ({error}): {roles} speak in that order, and it begins "
        f'with {begin!r}; correct or delete that row, or pass rows with a string "text".'
    )


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Iterable[Tensor]) -> None:
    """Raise CalibrationError that names the first token of the windows (int64) that the embedding has no row for."""
    rows = embedding_rows(model)
    for tokens in windows:
        outside = tokens[tokens >= rows]
        if len(outside):
            number = int(outside[0])
            raise CalibrationError(
                f"the text has the token {tokenizer.convert_ids_to_tokens(number)!r} (id {number}), but the model's "
                f"embedding has only {rows} rows; the tokenizer that belongs to the model is needed, or a text without "
                "that token."
            )


def embedding_rows(model: PreTrainedModel) -> int:
    """Return how many token ids the model knows; its weights may be packed."""
    embedding = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or embedding.get_parameter("weight").shape[0]
