"""A changed config.json is refused, or changes no logit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.checkpoint.reader import MANIFEST, verify
from quantc.errors import CheckpointError
from tests.golden.test_golden import HERE as GOLDEN
from tests.quantc.runtime.load.folders import (
    DOORS,
    EMBEDDING,
    PART,
    Change,
    assert_refused,
    edit,
    forget_checksums,
    load_verified,
    logits,
    refusals,
    rewrite,
)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(rms_norm_eps=0.1),
        lambda config: config["rope_parameters"].update(rope_theta=5.0),
        lambda config: config.update(hidden_act="relu"),
        lambda config: config["quantization_config"]["default"].update(symmetric=True),
        lambda config: config["quantization_config"]["default"].update(hadamard=8),
    ],
    ids=["eps", "rope", "activation", "symmetric", "hadamard"],
)
def test_a_config_that_would_compute_something_else_is_refused(packed: Path, change: Change) -> None:
    edit(packed / "config.json", change)
    for message in refusals(packed, [*DOORS, verify]):
        assert "config.json has changed" in message or "quantization_config has changed" in message


def test_the_message_says_how_to_keep_a_changed_config(packed: Path) -> None:
    edit(packed / "config.json", lambda config: config.update(rms_norm_eps=0.1))
    assert refusals(packed, [quantc.load]) == [
        f"{packed / 'config.json'} has changed since it was written (its checksum in {MANIFEST} differs), so the model "
        f"would compute something else; copy it again, or, if the change is wanted, delete its line in {MANIFEST}."
    ]
    edit(packed / MANIFEST, lambda content: content["files"].pop("config.json"))
    assert quantc.load(packed).config.rms_norm_eps == 0.1
    assert verify(packed).notes == (f"{MANIFEST} has no checksum of config.json, so it was not checked",)


def test_who_wrote_a_config_and_how_it_is_spelled_is_no_change(packed: Path) -> None:
    edit(packed / "config.json", lambda config: config.update(_name_or_path="elsewhere", transformers_version="5.99"))
    assert verify(packed).notes == ()
    quantc.load(packed)


def test_other_files_that_changed_are_notes(packed: Path) -> None:
    edit(packed / "generation_config.json", lambda content: content.update(temperature=0.5))
    (packed / "plan.yaml").unlink()
    (packed / "chat\x1b.jinja").write_text("{{ messages }}")
    for name in ("README.md", "report.json", "report.html"):  # people edit the first, and quantc the others
        (packed / name).write_text("{}")
    assert verify(packed).notes == (
        "chat?.jinja was added",
        "generation_config.json has changed",
        "plan.yaml is missing",
    )
    assert quantc.load(packed, verify=True).generation_config.temperature == 0.5


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v3_sparse"])
def test_verify_says_what_an_earlier_quantc_recorded_no_checksum_of(version: str) -> None:
    message = f"{MANIFEST} has no checksums of config.json and the tokenizer, so they were not checked"
    assert verify(GOLDEN / version).notes == (message,)


@pytest.mark.parametrize("files", [[], {"config.json": 1}, "config.json"])
def test_a_damaged_table_of_files_is_named(packed: Path, files: Any) -> None:
    edit(packed / MANIFEST, lambda content: content.update(files=files))
    assert_refused(packed, f"{packed / MANIFEST} has no readable table of files; copy it again.")


def test_a_config_of_more_layers_than_tensors_is_refused_before_they_are_built(packed: Path) -> None:
    forget_checksums(packed)
    edit(packed / "config.json", lambda config: config.update(num_hidden_layers=10**9))
    assert_refused(packed, "has num_hidden_layers 1000000000, but the files hold ", [quantc.load, load_verified])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_model"}, "transformers cannot build the model that config.json describes ("),
        ({"model_type": "t5"}, "AutoModelForCausalLM knows no model for T5Config; install the transformers that wrote"),
        ({"hidden_act": "no_such_function"}, "transformers cannot build the model that config.json describes ("),
        ({"num_attention_heads": 0}, "transformers cannot build the model that config.json describes ("),
    ],
)
def test_a_config_that_transformers_cannot_build_is_one_sentence(
    packed: Path, change: dict[str, Any], message: str
) -> None:
    forget_checksums(packed)
    edit(packed / "config.json", lambda config: config.update(change))
    assert_refused(packed, message, [quantc.load])


@pytest.mark.parametrize("rank", [65, 2**31 - 1])
def test_a_rank_that_no_file_has_allocates_nothing(packed: Path, rank: int) -> None:
    forget_checksums(packed)

    def set_rank(config: dict[str, Any]) -> None:
        config["quantization_config"]["default"]["rank"] = rank
        del config["quantization_config"]["sha256"]

    edit(packed / "config.json", set_rank)
    assert_refused(packed, f"has rank {rank}, but a weight of ", [*DOORS, verify])


@pytest.mark.parametrize("name", ["model.norm", EMBEDDING.removesuffix(".weight"), "config", f"{PART}.x", "training"])
def test_an_entry_that_names_no_matrix_is_refused(packed: Path, name: str) -> None:
    forget_checksums(packed)
    old = "model.layers.0.self_attn.q_proj"

    def rename_entry(config: dict[str, Any]) -> None:
        modules = config["quantization_config"]["modules"]
        modules[name] = modules.pop(old)
        del config["quantization_config"]["sha256"]

    def rename_parts(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "scales", "zeros"):
            tensors[f"{name}.{part}"] = tensors.pop(f"{old}.{part}")

    edit(packed / "config.json", rename_entry)
    rewrite(packed, rename_parts)
    assert_refused(packed, f"the checkpoint packs {name}, but LlamaForCausalLM has no such weight")


# Any change at all


def one_character_changed(text: str, numbers: random.Random) -> str:
    """config.json with one character replaced."""
    place = numbers.randrange(len(text))
    return text[:place] + numbers.choice('0123456789tfn"{}[],:.-eE_ x') + text[place + 1 :]


def leaves(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree that is no container itself."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found += leaves(value) if isinstance(value, (dict, list)) else [(node, key)]
    return found


def one_setting_changed(text: str, numbers: random.Random) -> str:
    """config.json with one character of its quantization_config replaced."""
    start, stop = text.index('"quantization_config"'), text.index('"rms_norm_eps"')
    return text[:start] + one_character_changed(text[start:stop], numbers) + text[stop:]


def one_value_changed(text: str, numbers: random.Random) -> str:
    """config.json with one number, flag or word of its quantization_config replaced by another one."""
    config = json.loads(text)
    container, key = numbers.choice(leaves(config["quantization_config"]))
    value = container[key]
    if isinstance(value, bool):
        container[key] = not value
    elif isinstance(value, int):
        container[key] = numbers.choice([value + 1, value - 1, 2 * value, value // 2, -value, float(value), 10**30])
    else:
        container[key] = numbers.choice(["per_ic", "per_oc", "quantc", "", None, 4])
    return json.dumps(config)


def assert_an_error_or_the_same_logits(folder: Path, expected: torch.Tensor, seeds: range) -> None:
    """Whichever character or value of quantization_config is replaced, or of all config.json where it is recorded."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    changes = [one_setting_changed, one_value_changed, *[one_character_changed] * (folder / MANIFEST).is_file()]
    for seed in seeds:
        change = changes[seed % len(changes)]
        (folder / "config.json").write_text(change(text, random.Random(seed)), encoding="utf-8")
        try:
            found = logits(quantc.load(folder))
        except CheckpointError as error:
            assert "\n" not in str(error)
        else:
            assert torch.equal(found, expected), seed


@pytest.mark.parametrize("kind", ["llama", "llama-copy"])
def test_a_changed_character_is_an_error_or_changes_nothing(built: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(built / kind, tmp_path / "changed")
    assert_an_error_or_the_same_logits(folder, logits(quantc.load(folder)), range(60))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama-copy", "qwen2"])
def test_thousands_of_changed_characters_are_errors_or_change_nothing(built: Path, tmp_path: Path, kind: str) -> None:
    folder = shutil.copytree(built / kind, tmp_path / "changed")
    assert_an_error_or_the_same_logits(folder, logits(quantc.load(folder)), range(3000))
