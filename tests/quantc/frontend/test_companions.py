"""Which files beside the weights a copy carries: of known kinds, not too large, and none that a link brings in."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from quantc.frontend import companions
from quantc.frontend.companions import model_files, notes_on_left, tokenizer_files
from quantc.frontend.resolve import COMPANIONS

OF_MODEL = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.jinja", "chat_template.json", "tekken.json", "additional_chat_templates/tool_use.jinja",
    "LICENSE", "LICENSE.txt", "Licence.md", "license-model", "NOTICE", "NOTICE.txt", "USE_POLICY.md", "COPYING",
)  # fmt: skip
OF_TOKENIZER = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "dict.txt",
    "tokenizer.model",
    "spiece.model",
    "qwen.tiktoken",
    "bpe.vocab",
)
UNLESS_SAVED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NEVER = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.Q4_0.gguf",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "all_results.json",
    "params.json", "hf_quant_config.json", "adapter_config.json", "README.md", "notes.txt", "train.jsonl",
    "data.parquet", "modeling_own.py", ".hidden.json", ".model", ".git/config.json", "onnx/config.json",
    "original/tokenizer.model", "additional_chat_templates/notes.txt", "additional_chat_templates/own.model",
    "license.exe", "request.json", "quantc.json",
)  # fmt: skip


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def named(files: list[Path], folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in files}


def test_files_of_known_kinds_are_carried_and_no_others(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", *OF_MODEL, *OF_TOKENIZER, *UNLESS_SAVED, *NEVER)
    (folder / "folder.json").mkdir()
    assert named(model_files(folder), folder) == set(OF_MODEL)
    assert named(tokenizer_files(folder, saved=True), folder) == set(OF_TOKENIZER)
    assert named(tokenizer_files(folder, saved=False), folder) == {*OF_TOKENIZER, *UNLESS_SAVED}
    assert notes_on_left(folder, saved=False) == []
    assert model_files(folder / "model.Q4_0.gguf") == []  # a GGUF file has its folder's files not for its own


@pytest.mark.parametrize("name", [*OF_MODEL, *OF_TOKENIZER, *UNLESS_SAVED, "README.md"])
def test_they_are_fetched_from_the_hub(name: str) -> None:
    assert any(fnmatchcase(name, pattern) for pattern in ("*.json", *COMPANIONS))


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "home/secret.json", "home/templates/key.jinja")
    folder = write(tmp_path / "model", "generation_config.json")
    (folder / "credentials.json").symlink_to(tmp_path / "home/secret.json")
    (folder / "tokenizer.model").symlink_to(os.path.relpath(tmp_path / "home/secret.json", folder))
    (folder / "additional_chat_templates").symlink_to(tmp_path / "home/templates")
    (folder / "broken.json").symlink_to(tmp_path / "nowhere")
    (folder / "processor_config.json").symlink_to(folder / "generation_config.json")
    assert named(model_files(folder), folder) == {"generation_config.json", "processor_config.json"}
    assert tokenizer_files(folder, saved=True) == []
    assert notes_on_left(folder, saved=True) == [
        "links to files outside of the model's folder were not copied: credentials.json, tokenizer.model, key.jinja; "
        "copy them if they are needed"
    ]


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    cache = write(tmp_path / "models--owner--tiny", "blobs/0a", "refs/main")
    snapshot = cache / "snapshots/0123"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for name in ("LICENSE", "generation_config.json", "additional_chat_templates/rag.jinja"):
        (snapshot / name).symlink_to(os.path.relpath(cache / "blobs/0a", (snapshot / name).parent))
    (snapshot / "other.json").symlink_to(cache / "refs/main")
    assert named(model_files(snapshot), snapshot) == {
        "LICENSE", "generation_config.json", "additional_chat_templates/rag.jinja"
    }  # fmt: skip
    reached = tmp_path / "link"
    reached.symlink_to(snapshot)
    assert len(model_files(reached)) == 3


def test_large_files_are_named_and_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "LARGEST", 1000)
    write(tmp_path, "generation_config.json")
    (tmp_path / "dataset.json").write_text("x" * 1001)
    assert named(model_files(tmp_path), tmp_path) == {"generation_config.json"}
    assert notes_on_left(tmp_path, saved=True) == [
        "files beside the weights this large were not copied: dataset.json (1.00 kB); copy them if they are needed"
    ]
