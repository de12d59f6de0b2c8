"""Rows of text and chat data sets in the shapes that people have: what each says, as a text or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..files.untrusted import parse_json

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
# ShareGPT and its kin name speakers in their own way; other names are the chat template's to know.
ROLES = {"human": USER, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
# What chat templates read of a message besides its role and content.
MORE_OF_A_MESSAGE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """messages: mappings of role, content and what else a chat template reads, in order. tools: as it takes them."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] | None = None


Document = str | Conversation


def read_row(row: dict[str, Any]) -> Document | None:
    """Return what a row says, by the first of SHAPES that fits; None where all are null, "" where one is blank.

    Raises ValueError that says what is wrong with it.
    """
    blank: Document | None = None
    for name, read in SHAPES.items():
        found = read(row) if row.get(name) is not None else None
        if found is not None and not is_blank(found):
            return found
        blank = blank if found is None else found
    if any(name in row for name in SHAPES) or not row:
        return blank
    fields = ", ".join(map(repr, row))
    raise ValueError(f"has none of the fields that are read but {fields}")


def _text(row: dict[str, Any]) -> str | None:
    return _string(row, "text")


def _conversation(name: str) -> Callable[[dict[str, Any]], Conversation | None]:
    return lambda row: _talk(row, _messages(row, name))


def _chosen(row: dict[str, Any]) -> Document | None:
    """Return the preferred one of two answers; data sets put the prompt into it, or beside it, or into one text."""
    if isinstance(row["chosen"], str) and row.get("prompt") is None:
        return row["chosen"]
    return _prompt_and("chosen")(row)


def _prompt_and(name: str) -> Callable[[dict[str, Any]], Conversation | None]:
    def read(row: dict[str, Any]) -> Conversation | None:
        answer = _turn(row, name, ASSISTANT)
        whole = bool(answer) and answer[0]["role"] != ASSISTANT
        return _talk(row, answer if whole else [*_turn(row, "prompt", USER), *answer])

    return read


def _completion(row: dict[str, Any]) -> Conversation | None:
    return _prompt_and("completion" if "completion" in row else "response")(row)


def _instruction(row: dict[str, Any]) -> Conversation | None:
    asked = [part for part in (_string(row, "instruction"), _string(row, "input")) if part]
    answer = _turn(row, "output" if "output" in row else "response", ASSISTANT)
    return _talk(row, [{"role": USER, "content": "\n\n".join(asked)}, *answer] if asked else [])


# By the field that tells them apart. A row with several, such as a prompt beside its messages, is read by the first.
SHAPES: dict[str, Callable[[dict[str, Any]], Document | None]] = {
    "text": _text,
    "messages": _conversation("messages"),
    "conversations": _conversation("conversations"),
    "conversation": _conversation("conversation"),
    "chosen": _chosen,
    "instruction": _instruction,
    "prompt": _completion,
}
FIELDS = (*SHAPES, "completion", "response", "input", "output", "system", "tools")


def _talk(row: dict[str, Any], messages: list[dict[str, Any]]) -> Conversation | None:
    """Return the conversation of a row with its own system prompt and tools; None where nobody says anything."""
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        return None
    system = _string(row, "system")
    if system and messages[0]["role"] != SYSTEM:
        messages = [{"role": SYSTEM, "content": system}, *messages]
    return Conversation(tuple(messages), _tools(row.get("tools")))


def _turn(row: dict[str, Any], name: str, role: str) -> list[dict[str, Any]]:
    """Return the messages of a field that is one speaker's text, or messages already."""
    if isinstance(row.get(name), (list, tuple)):
        return _messages(row, name)
    content = _string(row, name)
    return [{"role": role, "content": content}] if content else []


def _messages(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = row[name]
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = _from_json(found, name)
    if found is None:
        return []
    if not isinstance(found, (list, tuple)) or not all(isinstance(message, dict) for message in found):
        raise ValueError(f'has "{name}" that are no list of messages')
    return [_message(message, name) for message in found]


def _message(message: dict[str, Any], name: str) -> dict[str, Any]:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise ValueError(f'has "{name}" with a message that does not say who speaks ("role" or "from")')
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, name) for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f'has "{name}" with a message whose content is of type {type(content).__name__}')
    more = {key: message[key] for key in MORE_OF_A_MESSAGE if message.get(key)}
    return {"role": ROLES.get(role, role), "content": content or "", **more}


def _part(part: Any, name: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise ValueError(f'has "{name}" with content that is no text, such as an image')
    return text


def _string(row: dict[str, Any], name: str) -> str | None:
    found = row.get(name)
    if not isinstance(found, str | None):
        raise ValueError(f'has a "{name}" of type {type(found).__name__}')
    return found


def _tools(found: Any) -> tuple[Any, ...] | None:
    if isinstance(found, str) and found.strip():
        found = _from_json(found, "tools")
    return tuple(found) if found and isinstance(found, Iterable) and not isinstance(found, (str, dict)) else None


def _from_json(text: str, name: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f'has a "{name}" that is no JSON ({error})') from error


def is_blank(document: Document) -> bool:
    """Return whether there is nothing to read in a document."""
    return isinstance(document, str) and not document.strip()
