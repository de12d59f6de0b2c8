"""What is verified is what is loaded, by `quantc.load` and by transformers, whatever else the folder holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import quantc
from quantc.checkpoint.reader import CheckpointReader, verify
from quantc.checkpoint.shards import INDEX
from quantc.errors import CheckpointError
from tests.quantc.runtime.load.folders import (
    DOORS,
    PART,
    SHARD,
    assert_refused,
    drop,
    edit,
    forget_checksums,
    from_pretrained,
    load_verified,
    logits,
    refusals,
    rewrite,
)


def test_both_doors_give_the_same_model_and_generation_settings(packed: Path) -> None:
    edit(packed / "generation_config.json", lambda content: content.update(temperature=0.3, do_sample=True))
    one, two, three = (door(packed) for door in DOORS)
    assert torch.equal(logits(one), logits(three))
    assert torch.equal(logits(one), logits(two))
    assert one.generation_config.to_dict() == three.generation_config.to_dict()
    assert one.generation_config.temperature == 0.3
    assert one.config.to_dict() == three.config.to_dict()
    assert one.name_or_path == three.name_or_path == str(packed)
    assert not one.training


def test_a_whole_model_beside_the_shards_is_refused(packed: Path) -> None:
    tensors = load_file(packed / SHARD)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, packed / "model.safetensors")
    expected = (
        f"{packed / 'model.safetensors'} is not part of the checkpoint, but transformers would load it instead of the "
        f"files that {INDEX} lists; move it away."
    )
    assert refusals(packed, [*DOORS, verify]) == [expected] * 4


def test_both_doors_take_generation_settings_from_the_config_where_there_are_no_others(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    one, two = quantc.load(copy), from_pretrained(copy)
    assert one.generation_config.to_dict() == two.generation_config.to_dict()
    assert one.generation_config.eos_token_id == one.config.eos_token_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformers_weights": "other.safetensors"}, "names 'other.safetensors' as transformers_weights, but"),
        ({"configuration_files": ["config.4.0.0.json"]}, "has the key configuration_files, which makes transformers"),
        ({"_attn_implementation": "someone/kernel"}, "has the _attn_implementation 'someone/kernel', which makes"),
        ({"quantization_config": {"load_in_8bit": True}}, "has the key load_in_8bit, which makes transformers read"),
    ],
    ids=["weights", "config", "code", "method"],
)
def test_keys_that_lead_elsewhere_are_refused(packed: Path, change: dict[str, Any], message: str) -> None:
    forget_checksums(packed)
    settings = json.loads((packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    own = {"quantization_config": settings | change.pop("quantization_config", {})}
    edit(packed / "config.json", lambda content: content.update(change | own))
    # The others make from_pretrained leave before any code of quantc runs.
    doors = DOORS if "transformers_weights" in change else DOORS[:2]
    assert_refused(packed, message, [*doors, verify])


def test_weights_named_by_an_alias_in_the_config_are_refused(packed: Path) -> None:
    forget_checksums(packed)
    alias = {"attribute_map": {"transformers_weights": "elsewhere"}, "elsewhere": "other.safetensors"}
    edit(packed / "config.json", lambda content: content.update(alias))
    shutil.copy(packed / SHARD, packed / "other.safetensors")
    assert_refused(packed, "transformers would load other.safetensors, but the weights of", [from_pretrained])


def test_an_adapter_beside_the_weights_is_refused(packed: Path) -> None:
    (packed / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = f"{packed / 'adapter_config.json'} is not part of the checkpoint, but transformers would load the adapter"
    assert_refused(packed, message, [*DOORS, verify])


def test_a_variant_is_refused(packed: Path) -> None:
    shutil.copy(packed / SHARD, packed / "model.fp16.safetensors")
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(packed, variant="fp16")
    assert str(caught.value) == (
        f"transformers would load model.fp16.safetensors, but the weights of {packed} are in {SHARD}; load it without "
        "a variant, and with safetensors."
    )


def test_pickled_weights_are_refused_before_they_are_opened(packed: Path) -> None:
    (packed / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"transformers would load pytorch_model.bin, but the weights of"):
        from_pretrained(packed, use_safetensors=False)
    assert torch.equal(logits(from_pretrained(packed)), logits(quantc.load(packed)))


def test_a_model_from_the_hub_is_checked_where_it_lies_in_the_cache(packed: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache/models--someone--small"
    snapshot = repository / "snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    for file in (SHARD, INDEX, "config.json"):  # what transformers fetches: no manifest
        (snapshot / file).symlink_to(packed / file)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained("someone/small", dtype="auto", **options)
    assert torch.equal(logits(model), logits(quantc.load(packed)))
    edit(packed / "config.json", lambda content: content["quantization_config"]["default"].update(group_size=16))
    with pytest.raises(CheckpointError, match="quantization_config has changed since it was written"):
        AutoModelForCausalLM.from_pretrained("someone/small", dtype="auto", **options)


def test_tensors_that_nobody_checked_are_not_taken(packed: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    with pytest.raises(
        CheckpointError, match="handed over as a state_dict, which nothing has checked; pass the folder"
    ):
        type(quantc.load(packed)).from_pretrained(None, config=config, state_dict=load_file(packed / SHARD))


def test_a_quantization_config_from_elsewhere_is_refused(packed: Path, built: Path) -> None:
    config = AutoConfig.from_pretrained(packed)
    config.quantization_config["default"]["group_size"] = 16
    del config.quantization_config["sha256"]
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(packed, config=config)
    assert str(caught.value) == (
        f"the quantization_config handed over is not that of {packed / 'config.json'}; leave the config out."
    )


def swap_while_transformers_reads(monkeypatch: pytest.MonkeyPatch, swap: Callable[[], Any]) -> None:
    """Change files between the check and the load: right after transformers has read the config."""
    reading = AutoConfig.from_pretrained

    def read(*args: Any, **options: Any) -> Any:
        config = reading(*args, **options)
        swap()
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)


@pytest.mark.parametrize("door", DOORS)
def test_a_shard_that_is_replaced_after_the_check_is_not_loaded(
    packed: Path, monkeypatch: pytest.MonkeyPatch, door: Callable[[Path], PreTrainedModel]
) -> None:
    expected = logits(quantc.load(packed))
    save_file({name: tensor * 0 for name, tensor in load_file(packed / SHARD).items()}, packed / "new")
    checking = CheckpointReader._check_layouts

    def check_and_replace(reader: CheckpointReader) -> None:
        checking(reader)
        (packed / "new").replace(packed / SHARD)

    monkeypatch.setattr(CheckpointReader, "_check_layouts", check_and_replace)
    if door is load_verified:
        assert torch.equal(logits(door(packed)), expected)
    else:
        assert_refused(packed, f"{packed / SHARD} changed while it was loaded; load it again.", [door])
    assert not (packed / "new").exists()


def test_a_model_that_transformers_loaded_holds_no_open_file(packed: Path) -> None:
    model = from_pretrained(packed)
    assert torch.equal(logits(deepcopy(model)), logits(model))


def test_a_folder_inside_another_one_is_checked_too(packed: Path) -> None:
    assert torch.equal(logits(from_pretrained(packed.parent, subfolder="packed")), logits(quantc.load(packed)))
    rewrite(packed, drop(PART))
    with pytest.raises(CheckpointError, match=f"the part {PART} is missing"):
        from_pretrained(packed.parent, subfolder="packed")


def test_bytes_that_are_overwritten_after_their_checksum_are_not_loaded(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(quantc.load(packed))

    def overwrite() -> None:
        data = (packed / SHARD).read_bytes()
        with (packed / SHARD).open("r+b") as file:
            file.seek(len(data) // 2)
            file.write(bytes(len(data) - len(data) // 2))

    swap_while_transformers_reads(monkeypatch, overwrite)
    assert torch.equal(logits(load_verified(packed)), expected)


def test_a_config_that_changes_while_it_is_read_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change() -> None:
        edit(packed / "config.json", lambda content: content.update(rms_norm_eps=1.0))

    swap_while_transformers_reads(monkeypatch, change)
    assert_refused(packed, "config.json changed while it was read; load it again.", [quantc.load])


# The folder says how it is loaded


def test_the_card_says_to_install_quantc(packed: Path) -> None:
    card = (packed / "README.md").read_text(encoding="utf-8")
    assert card.startswith(
        "---\nlibrary_name: transformers\ntags:\n- quantc\n---\n\n# llama-float, quantized with quantc"
    )
    assert "\nquantc must be installed, which teaches transformers this format. Without it transformers refuses" in card
    report = json.loads((packed / "report.json").read_text(encoding="utf-8"))
    assert f"{report['bits_per_weight']:.2f} bits per weight" in card
