"""The files of a checkpoint beside its weights: what the source had and a reader needs, and a card with its licence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import quantc
from quantc.checkpoint.reader import verify
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer

BESIDE = {
    "preprocessor_config.json": '{"size": 3}',
    "additional_chat_templates/tool_use.jinja": "{{ messages[0]['content'] }} with tools",
    "chat_template.jinja": "{{ messages[0]['content'] }}",
    "LICENSE": "Apache License\nVersion 2.0, January 2004\n",
    "NOTICE": "by somebody",
    "tokenizer.model": "pieces",
    "merges.txt": "#version: 0.2",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = save_with_tokenizer(build("llama"), tmp_path / "model")
    for name, text in BESIDE.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (model / "optimizer.pt").write_text("state")
    (tmp_path / "private.json").write_text("{}")
    (model / "link.json").symlink_to(tmp_path / "private.json")
    return tmp_path


def test_a_checkpoint_has_what_its_source_had_beside_the_weights(folder: Path) -> None:
    report = quantize_saved(folder, bits=4, group_size=8, method="rtn")
    packed = folder / "packed"
    assert {name: (packed / name).read_text() for name in BESIDE} == BESIDE
    assert not (packed / "optimizer.pt").exists()
    assert not (packed / "link.json").exists()
    said = "links to files outside of the model's folder were not copied: link"
    assert any(note.startswith(said) for note in report.notes)
    assert verify(packed).notes == ()
    tokenizer = AutoTokenizer.from_pretrained(packed)
    asked = [{"role": "user", "content": "w5"}]
    assert tokenizer.apply_chat_template(asked, tokenize=False, chat_template="tool_use") == "w5 with tools"
    listed = set(json.loads((packed / "quantc.json").read_text())["written"])
    assert listed >= {*BESIDE, "README.md"}
    again = quantize_saved(folder, bits=4, group_size=8, method="rtn", force=True)  # all of it is known as quantc's
    assert again.output == report.output
    card = ModelCard((packed / "README.md").read_text())
    assert card.data.to_dict() == {"library_name": "transformers", "license": "apache-2.0", "tags": ["quantc"]}


def test_a_tokenizer_that_cannot_be_read_is_copied(folder: Path) -> None:
    (folder / "model/tokenizer.json").write_text("{")
    report = quantc.quantize(
        folder / "model", bits=4, group_size=8, calib="none", head_bits="keep", out=folder / "packed"
    )
    assert (folder / "packed/tokenizer.json").read_text() == "{"
    assert (folder / "packed/tokenizer_config.json").is_file()
    assert any(note.startswith("the tokenizer's files are copied unread: ") for note in report.notes)
