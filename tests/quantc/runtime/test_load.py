"""What is verified is what is loaded: through `quantc.load` and transformers, whatever else the folder holds."""

from __future__ import annotations

import json
import random
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
from quantc.checkpoint.reader import MANIFEST, CheckpointReader, verify
from quantc.checkpoint.shards import INDEX, checksum
from quantc.driver.model_card import model_card
from quantc.errors import CheckpointError
from tests.families import build
from tests.golden.test_golden import HERE as GOLDEN
from tests.helpers import save_with_tokenizer

SHARD = "model-00001-of-00001.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
PART = "model.layers.1.mlp.down_proj.scales"
EMBEDDING = "model.embed_tokens.weight"
TOKENS = torch.tensor([[3, 17, 42, 99, 3, 7, 120, 64]])
Change = Callable[[dict[str, Any]], Any]


def from_pretrained(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)


def load_verified(folder: Path) -> PreTrainedModel:
    return quantc.load(folder, verify=True)


DOORS = [quantc.load, load_verified, from_pretrained]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama with a head of its own, qwen2 with a tied one, each packed in 4 bits, and copies of save_pretrained."""
    folder = tmp_path_factory.mktemp("built")
    for name in ("llama", "qwen2"):
        save_with_tokenizer(build(name), folder / f"{name}-float")
        settings: Any = {"bits": 4, "group_size": 32, "head_bits": "keep", "method": "rtn"}
        quantc.quantize(folder / f"{name}-float", out=folder / name, **settings)
        quantc.load(folder / name).save_pretrained(folder / f"{name}-copy")
    return folder


@pytest.fixture
def packed(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built / "llama", tmp_path / "packed")


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """Without a manifest, as save_pretrained writes it."""
    return shutil.copytree(built / "llama-copy", tmp_path / "copy")


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def edit(file: Path, change: Change) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def forget_checksums(folder: Path) -> None:
    """As if an earlier quantc had written the folder."""
    edit(folder / MANIFEST, lambda content: content.pop("files"))


def rewrite(folder: Path, change: Change) -> None:
    """The tensors changed, and index and manifest with them, so that only the model itself can tell."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    names = {"I64": torch.int64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
    spelled = {dtype: name for name, dtype in names.items()}
    entries = {
        name: {"dtype": spelled[tensor.dtype], "shape": list(tensor.shape), "sha256": checksum(tensor)}
        for name, tensor in tensors.items()
    }
    edit(folder / INDEX, lambda content: content.update(weight_map=dict.fromkeys(tensors, SHARD)))
    edit(folder / MANIFEST, lambda content: content.update(tensors=entries))


def refusals(folder: Path, doors: list[Callable[[Path], Any]] | None = None) -> list[str]:
    """What each door says, one line each; every one of them refuses."""
    found = []
    for door in doors or DOORS:
        with pytest.raises(CheckpointError) as caught:
            door(folder)
        assert "\n" not in str(caught.value)
        found.append(str(caught.value))
    return found


def assert_refused(folder: Path, message: str, doors: list[Callable[[Path], Any]] | None = None) -> None:
    for found in refusals(folder, doors):
        assert message in found


# What transformers would read


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


# Every tensor of the model, and no other


def drop(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(names)]


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        (NORM, NORM),
        ("model.norm.weight", "model.norm.weight"),
        (EMBEDDING, EMBEDDING),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_missing_tensor_is_never_drawn_at_random(packed: Path, lost: str, named: str) -> None:
    rewrite(packed, drop(lost))
    message = (
        f"{packed}: LlamaForCausalLM needs the tensor {named}, but the files have none; copy the checkpoint again."
    )
    assert refusals(packed) == [message] * 3


def test_a_missing_module_is_never_drawn_at_random(packed: Path) -> None:
    forget_checksums(packed)

    def forget(content: dict[str, Any]) -> None:
        settings = content["quantization_config"]
        settings["modules"] = {name: own for name, own in settings["modules"].items() if ".1.mlp" not in name}
        del settings["sha256"]

    rewrite(packed, drop("model.layers.1.mlp"))
    edit(packed / "config.json", forget)
    assert_refused(packed, "needs the tensor model.layers.1.mlp.down_proj.weight, but the files have none")


def test_a_missing_part_is_no_uninitialised_memory(packed: Path) -> None:
    rewrite(packed, drop(PART))
    assert_refused(packed, f"the part {PART} is missing, but the spec of that weight needs it")


def test_a_missing_embedding_of_a_tied_head_is_never_drawn_at_random(built: Path, tmp_path: Path) -> None:
    tied = shutil.copytree(built / "qwen2", tmp_path / "tied")
    rewrite(tied, drop(EMBEDDING))
    assert_refused(tied, f"needs the tensor {'lm_head.weight'}, but the files have none")


def test_a_tensor_that_the_model_does_not_take_is_refused(packed: Path) -> None:
    rewrite(packed, lambda tensors: tensors.update({"model.layers.2.extra": torch.zeros(3)}))
    message = "the files have the tensor model.layers.2.extra, but LlamaForCausalLM takes no such tensor; config.json"
    assert_refused(packed, message)


def test_a_head_beside_the_embedding_it_is_tied_to_is_refused(built: Path, tmp_path: Path) -> None:
    tied = shutil.copytree(built / "qwen2", tmp_path / "tied")
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": torch.randn_like(tensors[EMBEDDING])}))
    assert_refused(
        tied, f"the files have lm_head.weight and {EMBEDDING}, but config.json says that they are one tensor"
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(7),
            f"{NORM} has the shape (7,), but config.json describes (64,); the two do not belong together.",
        ),
        (torch.zeros(64, dtype=torch.uint8), f"{NORM} is U8, but the model has torch.float32 there; copy it again."),
    ],
)
def test_a_tensor_of_another_shape_or_kind_is_refused(packed: Path, tensor: torch.Tensor, message: str) -> None:
    rewrite(packed, lambda tensors: tensors.update({NORM: tensor}))
    assert_refused(packed, message)
    with pytest.raises(CheckpointError, match="do not belong together|copy it again"):
        from_pretrained(packed, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_copy_that_save_pretrained_made_loads_through_both_doors(built: Path, name: str) -> None:
    expected = logits(quantc.load(built / name))
    for door in (quantc.load, from_pretrained):
        assert torch.equal(logits(door(built / f"{name}-copy")), expected)


def test_a_shard_that_holds_more_than_the_index_says_is_refused(packed: Path) -> None:
    tensors = load_file(packed / SHARD)
    save_file(tensors | {"more": torch.zeros(2)}, packed / SHARD)
    message = f"{packed / SHARD} holds the tensor more, but {INDEX} does not list it; copy the checkpoint again."
    assert refusals(packed, [*DOORS, verify]) == [message] * 4


def test_a_tensor_in_two_shards_is_refused(packed: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    tensors = load_file(packed / SHARD)
    save_file({NORM: tensors[NORM] * 2, "model.norm.weight": tensors.pop("model.norm.weight")}, packed / second)
    save_file(tensors, packed / SHARD)
    edit(packed / INDEX, lambda content: content["weight_map"].update({"model.norm.weight": second}))
    assert_refused(
        packed, f"{second} holds the tensor {NORM}, but {INDEX} says that it is in {SHARD}", [*DOORS, verify]
    )


def test_a_tensor_without_a_checksum_is_refused(packed: Path) -> None:
    edit(packed / MANIFEST, lambda content: content["tensors"].pop(NORM))
    assert_refused(packed, f"the tensor {NORM} is not listed in {MANIFEST}, so it has no checksum", [*DOORS, verify])


# config.json


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


# The folder says how it is loaded


def test_the_card_says_to_import_quantc_first(packed: Path) -> None:
    card = (packed / "README.md").read_text(encoding="utf-8")
    assert card.startswith(
        "---\nlibrary_name: transformers\ntags:\n- quantc\n---\n\n# llama-float, quantized with quantc"
    )
    assert "\nimport quantc  # before the model is loaded" in card
    assert "Without `import quantc`, transformers warns of an unknown quantization type and goes on with random" in card
    report = json.loads((packed / "report.json").read_text(encoding="utf-8"))
    assert f"{report['bits_per_weight']:.2f} bits per weight" in card


def test_the_card_of_a_hub_model_names_the_model_it_was_made_from() -> None:
    snapshot = Path("/cache/models--someone--small-1B/snapshots/0123")
    card = model_card("small-1B", snapshot, 4.25, 1000)
    assert card.startswith("---\nbase_model: someone/small-1B\nlibrary_name: transformers\n")
    assert "\n# someone/small-1B, quantized with quantc\n\n4.25 bits per weight" in card
