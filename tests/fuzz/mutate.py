"""Damages files of the kinds that quantc reads: their structure where they have one, else their bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import yaml

DIGITS = "@digits@"  # becomes a number of 5,000 digits, which no library writes
BOMB = "@bomb@"  # becomes aliases of aliases in YAML, and brackets in brackets in JSON
AWKWARD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**53, 2**63, -(2**63), 10**12, 10**30, 10**300,
    0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "a", "4", "\x1b[31m[/x]", "../../victim", "/dev/zero", "\ud800", "a" * 100_000, "\x00", "\u202e", "none",
    [], {}, [[]], [0], [1, 2], [-1, 4], [2**40, 2**40], ["a"], {"a": 1}, [None], DIGITS, BOMB,
)  # fmt: skip
BYTES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xfe", b"{", b"[", b'"', b"\n", b"&a", b"*a", b"!!", b"\x1b[2J")
SIZES = (0, 1, 7, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
BRACKETS = "[" * 3000 + "]" * 3000
ALIASES = "[&a0 [x,x,x,x,x,x,x,x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)) + "]"


def mutate(file: Path, content: bytes, random: Random) -> bytes:
    """Return other bytes for a file of this name and content."""
    structured = STRUCTURED.get(file.suffix)
    if structured is not None and random.random() < 0.8:
        return structured(content, random)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        content = random.choice(BYTE_MUTATORS)(content, random)
    return content


def _flip(content: bytes, random: Random) -> bytes:
    if not content:
        return b"\x00"
    at = random.randrange(min(len(content), random.choice((16, 400, len(content)))))
    return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]


def _overwrite(content: bytes, random: Random) -> bytes:
    at, new = random.randint(0, len(content)), random.choice(BYTES)
    return content[:at] + new + content[at + len(new) :]


def _size(content: bytes, random: Random) -> bytes:
    at = random.randint(0, min(len(content), 400))
    return content[:at] + struct.pack("<Q", random.choice(SIZES)) + content[at + 8 :]


def _cut(content: bytes, random: Random) -> bytes:
    return content[: random.randint(0, len(content))]


def _insert(content: bytes, random: Random) -> bytes:
    at = random.randint(0, len(content))
    return content[:at] + random.choice(BYTES) * random.choice((1, 1, 100)) + content[at:]


def _remove(content: bytes, random: Random) -> bytes:
    at = random.randint(0, len(content))
    return content[:at] + content[at + random.randint(1, 200) :]


def _repeat(content: bytes, random: Random) -> bytes:
    at = random.randint(0, len(content))
    part = content[at : at + random.randint(1, 400)]
    return content[:at] + part + content[at:]


BYTE_MUTATORS = (_flip, _flip, _overwrite, _size, _cut, _insert, _remove, _repeat)


def _json(content: bytes, random: Random) -> bytes:
    tree = _tree(json.loads(content), random)
    return json.dumps(tree).replace(f'"{DIGITS}"', "9" * 5000).replace(f'"{BOMB}"', BRACKETS).encode()


def _yaml(content: bytes, random: Random) -> bytes:
    text = json.dumps(_tree(yaml.safe_load(content), random))
    special = random.choice((ALIASES, BRACKETS, "!!python/object:os.system {}", "!!binary AAAA", "2020-01-01", "*a"))
    text = text.replace(f'"{DIGITS}"', random.choice(("9" * 5000, "0x" + "f" * 5000))).replace(f'"{BOMB}"', special)
    return text.replace("NaN", ".nan").replace("Infinity", ".inf").encode()


def _jsonl(content: bytes, random: Random) -> bytes:
    lines = content.splitlines(keepends=True)
    at = random.randrange(len(lines))
    return b"".join([*lines[:at], _json(lines[at], random) + b"\n", *lines[at + 1 :]])


def _safetensors(content: bytes, random: Random) -> bytes:
    """Half of the time the header says something else, else a byte of the tensors changes."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    if random.random() < 0.5:
        at = random.randrange(len(body))
        return content[: 8 + size] + body[:at] + bytes([body[at] ^ (1 << random.randrange(8))]) + body[at + 1 :]
    header = _json(header, random)
    if random.random() < 0.5:  # as the format has it, or the file is refused for its length alone
        header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


STRUCTURED: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".jsonl": _jsonl,
    ".safetensors": _safetensors,
}


def _tree(tree: Any, random: Random) -> Any:
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        tree = _change(tree, random)
    return tree


def _change(tree: Any, random: Random) -> Any:
    """One value somewhere in a tree replaced, removed, doubled, or moved to another key; deep ones as often as not."""
    inside = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    if not inside or random.random() < 0.1:
        return _leaf(tree, random)
    key, value = random.choice(inside)
    action = random.random()
    if action < 0.75:
        tree[key] = _change(value, random)
    elif action < 0.85:
        del tree[key]
    elif isinstance(tree, dict):
        other = str(random.choice(inside)[0])
        tree[random.choice((other, f"{key}x", "", "a", "\x1b[1m", "[/x]", "9" * 50))] = deepcopy(value)
    else:
        tree.extend(deepcopy(value) for _ in range(random.choice((1, 1, 50))))
    return tree


def _leaf(value: Any, random: Random) -> Any:
    """A value of another kind or range; or one near it, which is more likely to be accepted."""
    near = random.random() < 0.4
    if near and isinstance(value, (int, float)) and not isinstance(value, bool):
        return random.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    if near and isinstance(value, str) and value:
        at = random.randrange(len(value))
        return value[:at] + random.choice(("", "x", "/", "0", ".")) + value[at + 1 :]
    return deepcopy(random.choice(AWKWARD))
