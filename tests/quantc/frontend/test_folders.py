"""Folders as people have them: two models in one, other formats, other kinds of model. Each is told in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import quantc
from quantc.checkpoint.integrity import REMEDY
from quantc.frontend import open_model
from tests.families import VOCAB, build
from tests.helpers import save_with_tokenizer
from tests.quantc.frontend.folders import INDEX, WEIGHTS, edit_config, refusal, shard

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


def both_readings(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as it is quantized, and as transformers loads it for evaluation."""
    source = open_model(folder)
    source.load(NAME)
    return source.model.get_parameter(NAME), source.load_whole(torch.float32).get_parameter(NAME)


def assert_read_alike(folder: Path, expected: torch.Tensor) -> None:
    assert all(torch.equal(found, expected) for found in both_readings(folder))


def test_an_index_beside_a_single_file(pristine: Path, folder: Path) -> None:
    names = shard(folder, 2)
    stale = load_file(pristine / WEIGHTS)
    stale[NAME] += 1
    save_file(stale, folder / WEIGHTS, metadata={"format": "pt"})
    assert open_model(folder).notes == [
        f"{folder} holds weights twice: {WEIGHTS}, and {INDEX} with {names[0]}, {names[1]}; {WEIGHTS} was read, as "
        "transformers does, so remove whichever is out of date"
    ]
    assert_read_alike(folder, stale[NAME])


def test_an_index_of_the_single_file_alone(folder: Path) -> None:
    listed = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    assert open_model(folder).notes == []


def test_files_that_are_not_read_are_named(pristine: Path, folder: Path) -> None:
    expected = load_file(folder / WEIGHTS)[NAME]
    shard(folder, 2)
    for name in ("consolidated.safetensors", "model-00001-of-00003.safetensors", "model.fp16.safetensors"):
        shutil.copy(pristine / WEIGHTS, folder / name)
    (folder / "model.Q4_0.gguf").touch()
    (folder / "pytorch_model.bin").touch()  # the same weights by custom, and never read
    (folder / "original").mkdir()
    assert open_model(folder).notes == [
        "files beside the weights were not read: consolidated.safetensors, model-00001-of-00003.safetensors, "
        "model.fp16.safetensors and 1 more"
    ]
    assert_read_alike(folder, expected)


def test_a_tensor_in_two_shards(pristine: Path, folder: Path, tmp_path: Path) -> None:
    names = shard(folder, 2)
    whole = load_file(pristine / WEIGHTS)
    parts = [load_file(folder / name) for name in names]
    both = next(tensor for tensor in parts[0] if tensor.endswith("proj.weight"))
    save_file({**parts[1], both: whole[both]}, folder / names[1], metadata={"format": "pt"})
    assert open_model(folder).notes == []
    save_file({**parts[1], both: whole[both] + 1}, folder / names[1], metadata={"format": "pt"})
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: {both} is in {names[0]} and, with other values, in {names[1]}; shards of one save are needed, so "
        "fetch them again."
    )


def test_an_index_that_lists_what_its_shard_does_not_hold(folder: Path, tmp_path: Path) -> None:
    names = shard(folder, 2)
    part = load_file(folder / names[0])
    lost = sorted(part)[0]
    del part[lost]
    save_file(part, folder / names[0], metadata={"format": "pt"})
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: {INDEX} lists {lost} in {names[0]}, which does not hold it; index and shards of one save are "
        "needed, so fetch them again."
    )


@pytest.mark.parametrize("more", ["../../", "\\u0000", "x" * 250])
def test_an_index_that_points_outside_its_folder(pristine: Path, folder: Path, tmp_path: Path, more: str) -> None:
    names = shard(folder, 2)
    text = (folder / INDEX).read_text().replace(names[0], f"{more}{names[0]}")
    (folder / INDEX).write_text(text)
    assert refusal(folder, tmp_path / "out") == (
        f"{folder / INDEX} points outside its folder ({more.replace('u00', 'x')}{names[0]}); do not use it."
    )


def test_a_config_that_names_the_weights(folder: Path, tmp_path: Path) -> None:
    other = load_file(folder / WEIGHTS)
    other[NAME] += 1
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    edit_config(folder, transformers_weights="other.safetensors")
    assert_read_alike(folder, other[NAME])
    quantc.quantize(folder, bits=4, method="rtn", out=tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["transformers_weights"] == REMEDY
    edit_config(folder, transformers_weights="../other.safetensors")
    assert "has '../other.safetensors' as transformers_weights" in refusal(folder, tmp_path / "no")
    edit_config(folder, transformers_weights="none.safetensors")
    assert "none.safetensors, which config.json names as transformers_weights, is missing" in refusal(
        folder, tmp_path / "no"
    )


def test_an_adapter_beside_the_model(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(
        f"{folder} holds a model and an adapter for it (adapter_config.json), which would be left"
    )


def test_a_git_lfs_pointer(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusal(folder, tmp_path / "out") == (
        f"{folder / WEIGHTS} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder."
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.fp16.safetensors", "is stored in a variant only (model.fp16.safetensors); rename that file to"),
        ("model-00001-of-00002.safetensors", "is in shards without model.safetensors.index.json; fetch that file"),
        ("consolidated.safetensors", "is in the format of its authors' own code (consolidated.safetensors); fetch"),
        ("gptq_model-4bit-128g.safetensors", "is stored under AutoGPTQ's name (gptq_model-4bit-128g.safetensors); ren"),
        ("weights.safetensors", "is without a model.safetensors (it has weights.safetensors); rename that file if"),
        ("tiny.Q4_0.gguf", "is a folder of GGUF files; pass the file itself: tiny.Q4_0.gguf."),
        ("onnx/model.onnx", "is an ONNX model; use the model it was exported from."),
        ("tf_model.h5", "is stored as TensorFlow weights (tf_model.h5); use the model's safetensors version."),
        ("flax_model.msgpack", "is stored as Flax weights (flax_model.msgpack); use the model's safetensors version."),
        ("weights.npz", "is stored as MLX arrays (weights.npz); use the model's safetensors version."),
        ("__0_0.distcp", "is a distributed training checkpoint; merge its shards; load the model with transformers"),
    ],
)
def test_weights_in_another_form(folder: Path, tmp_path: Path, file: str, said: str) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / WEIGHTS).rename(folder / file)
    assert refusal(folder, tmp_path / "out").startswith(f"{folder} {said}")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model_index.json", "is a diffusers pipeline, not a language model; pass a decoder language model."),
        ("tiny.gguf", "is a folder of GGUF files; pass the file itself: tiny.gguf."),
        ("params.json", "is in the format of its authors' own code; use the model's transformers version."),
        ("model.onnx", "is an ONNX model; use the model it was exported from."),
        ("saved_model.pb", "is a TensorFlow model; use the model's safetensors version."),
        ("tokenizer.json", "is a tokenizer without a model; pass the model's folder."),
        ("checkpoint-20/config.json", "holds no model itself, but 1 folders with one; pass one of them, such as "),
        ("snapshots/0123/config.json", "is a model's folder in the hub's cache; pass the snapshot in it, "),
        ("adapter_config.json", "is an adapter for owner/base, not a model; merge it first: PeftModel.from_pretrained"),
    ],
)
def test_folders_without_a_config(tmp_path: Path, file: str, said: str) -> None:
    folder = tmp_path / "model"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text('{"base_model_name_or_path": "owner/base"}')
    (folder / file).with_name("model.safetensors").touch() if file.startswith("checkpoint") else None
    assert refusal(folder, tmp_path / "out").startswith(f"{folder} {said}")


@pytest.mark.parametrize(
    ("model_type", "architecture", "said"),
    [
        ("llama", "LlamaForSequenceClassification", "is a reward or classification model (LlamaForSequenceClassificat"),
        ("llama", "LlamaForTokenClassification", "is a reward or classification model (LlamaForTokenClassification)"),
        ("bert", "BertModel", "is a text encoder (BertModel), in which every token sees the whole text; a decoder"),
        ("roberta", "", "is a text encoder (roberta), in which every token sees the whole text; a decoder model that"),
        ("modernbert", "ModernBertForMaskedLM", "is a text encoder (ModernBertForMaskedLM), in which every token sees"),
        ("t5", "T5ForConditionalGeneration", "is an encoder-decoder model (T5ForConditionalGeneration); a decoder"),
        (
            "bart",
            "BartModel",
            "is an encoder-decoder model (BartModel); a decoder model that AutoModelForCausalLM knows",
        ),
    ],
)
def test_other_kinds_of_models(tmp_path: Path, model_type: str, architecture: str, said: str) -> None:
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB)
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(tmp_path / "model")
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'model'} {said}")
    assert "a decoder model that AutoModelForCausalLM knows is needed" in message


def test_the_name_of_a_hub_snapshot(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "models--owner--tiny-model"
    blobs = shutil.copytree(pristine, cache / "blobs")
    snapshot = cache / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert open_model(snapshot).name == "tiny-model"
    monkeypatch.chdir(tmp_path)
    report = quantc.quantize(snapshot, bits=4, group_size=8, method="rtn")
    assert report.output == "tiny-model-quantc-w4g8"
