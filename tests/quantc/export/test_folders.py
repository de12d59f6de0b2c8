"""Checkpoints written for runtimes that load folders, read back by transformers where that reads the container."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quantc
from quantc.cli import main
from quantc.cli.options import TARGETS
from quantc.errors import CheckpointError, UsageError
from quantc.evaluation import llama_cpp
from quantc.export.folders.card import folder_card
from quantc.export.folders.job import CONTAINERS
from quantc.numerics.qtensor import QTensor
from quantc.planning.targets import RUNTIMES
from quantc.runtime.modules import unpack
from tests.helpers import save_with_tokenizer, thinned
from tests.quantc.export.tiny import build
from tests.readers.lab import rotate_heads

TOKENS = torch.arange(1, 30)[None]


def checkpoint(folder: Path, model: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """Return a packed checkpoint of a tiny model in groups of 32, its embedding and head as they were."""
    built = build(model, **({"attention_bias": False, "mlp_bias": False} if model == "llama" else {}))
    save_with_tokenizer(built.to(dtype), folder / "model")
    chosen = {"preset": "fast", "method": "rtn", "bits": 4, "group_size": 32, "head_bits": "keep", **settings}
    quantc.quantize(folder / "model", out=folder / "packed", **chosen)
    return folder / "packed"


def check_with_transformers(packed: Path, out: Path) -> None:
    """Export a checkpoint to compressed-tensors: transformers computes quantc's logits from the folder."""
    exported = quantc.export(packed, to="compressed-tensors", out=out)
    assert exported.agreement is not None
    assert exported.agreement.error < 1e-5
    other = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    expected = logits(quantc.load(packed, dtype=torch.float32))
    assert torch.allclose(logits(other), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits.float()
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "zeros": {"bits": 4},
    "narrow": {"bits": 3, "symmetric": True},
    "mixed": {"bits": 8, "symmetric": True, "pins": {"*down_proj": 5}},
}


@pytest.mark.parametrize(
    ("model", "stored"), thinned([*product(["llama", "qwen2", "qwen3", "gemma3"], SETTINGS)], every=4)
)
def test_transformers_computes_the_same_from_compressed_tensors(model: str, stored: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, model, **SETTINGS[stored])
    check_with_transformers(packed, tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    quantc.export(packed, to="compressed-tensors", out=tmp_path / "out", force=True)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "gguf"])
def test_weights_are_read_back_from_every_container(target: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, symmetric=True)
    exported = quantc.export(packed, to=target)
    folder = tmp_path / f"packed-{target}"
    assert exported.output == str(folder)
    assert exported.schemes == {"w4g32sym": 14}
    config = json.loads((folder / "config.json").read_text())
    assert config.get("quantization_config") or config["quantization"]
    assert (folder / "tokenizer.json").is_file()
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("target", ["gptq", "awq", "mlx"])
def test_zero_points_are_stored_as_they_are(target: str, tmp_path: Path) -> None:
    exported = quantc.export(checkpoint(tmp_path), to=target, out=tmp_path / "out")
    assert exported.schemes == {"w4g32": 14}
    assert any("which the dtype of scales rounds" in note for note in exported.notes) == (target == "mlx")
    if target == "gptq":
        settings = json.loads((tmp_path / "out/quantize_config.json").read_text())
        assert settings["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize("bits", thinned([3, 2, 5, 6, 8], every=3))
def test_every_width_that_mlx_has(bits: int, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, bits=bits)
    assert quantc.export(packed, to="mlx", out=tmp_path / "out").schemes == {f"w{bits}g32": 14}


def test_tensors_have_the_layout_that_awq_documents(tmp_path: Path) -> None:
    """Nibble i of a word is the code of output (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    packed = checkpoint(tmp_path)
    quantc.export(packed, to="awq", out=tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    words, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
    zeros = tensors[f"{name}.qzeros"]
    expected = unpack(quantc.load(packed), torch.float32).get_submodule(name).weight
    for output, nibble in ((0, 0), (1, 4), (2, 1), (7, 7)):
        code, zero = (int(word[0, 0]) >> 4 * nibble & 15 for word in (words, zeros))
        assert (code - zero) * float(scales[0, output]) == pytest.approx(float(expected[output, 0]))


def test_a_group_as_long_as_some_rows_is_one_of_that_length(tmp_path: Path) -> None:
    """64 inputs are one group of 64, and AWQ knows no other way to say so."""
    save_with_tokenizer(build("qwen2", intermediate_size=128), tmp_path / "model")
    settings = {"bits": 4, "group_size": 64, "preset": "fast", "method": "rtn", "head_bits": "keep"}
    quantc.quantize(tmp_path / "model", out=tmp_path / "packed", **settings)
    for target in ("awq", "mlx", "compressed-tensors"):
        quantc.export(tmp_path / "packed", to=target)
    config = json.loads((tmp_path / "packed-awq/config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    assert set(json.loads((tmp_path / "packed-mlx/config.json").read_text())["quantization"]) == {
        "bits", "group_size", "mode", "lm_head"
    }  # fmt: skip


@pytest.mark.parametrize("target", ["compressed-tensors", "gguf"])
def test_rotations_in_the_weights_around_heads_are_in_the_file(target: str, tmp_path: Path) -> None:
    report = rotate_heads(save_with_tokenizer(build("llama"), tmp_path / "model"), tmp_path)
    assert report.rewrites == {"rotate": {"value": 2}}
    exported = quantc.export(tmp_path / "packed", to=target, out=tmp_path / "out.gguf", tokenizer=target != "gguf")
    if target == "gguf" and llama_cpp.missing() is not None:
        pytest.skip(str(llama_cpp.missing()))
    assert exported.agreement is not None
    assert exported.agreement.error < (0.1 if target == "gguf" else 1e-5)  # llama.cpp has activations of 8 bits


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({}, "auto-round", "it has zero points; quantize the model again with --symmetric"),
        (
            {"bits": 5},
            "gptq",
            "it has codes of 5 bits, and gptq holds 2, 3, 4, 8; quantize the model again with --bits",
        ),
        ({"bits": 7}, "mlx", "it has codes of 7 bits"),
        ({"preset": "balanced", "method": "gptq"}, "gptq", "its input is rotated while the model runs"),
        ({"head_bits": 8}, "vllm", "it is the embedding; quantize the model again with --target vllm"),
        ({"group_size": 48}, "mlx", "it has groups of 48 of 96 inputs, and mlx holds 32, 64, 128"),
        ({"pins": {"*up_proj": 8}}, "vllm", "multiplies model.layers.0.mlp.gate_proj and up_proj at once"),
        ({"pins": {"*up_proj": 16}}, "vllm", "multiplies model.layers.0.mlp.gate_proj and up_proj at once"),
        ({"pins": {"*up_proj": 8}}, "compressed-tensors", "with several widths or group sizes is read with symmetric"),
        ({"formats": ["nf4"]}, "mlx", "it is stored as nf4-g64, and mlx holds whole numbers; .* with --bits 4"),
        ({"formats": ["fp8-g32"]}, "vllm", "fp8-g32, and vllm holds whole numbers, nvfp4, mxfp4, fp8-grow"),
    ],
)
def test_what_a_container_cannot_hold_is_refused_by_name(
    settings: dict[str, Any], target: str, message: str, tmp_path: Path
) -> None:
    if settings.get("method") == "gptq":
        settings = {**settings, "calib": str(tmp_path / "model/text.txt"), "samples": 2, "seq_len": 16}
    if "formats" in settings:
        settings = {**settings, "bits": None, "group_size": None}
    packed = checkpoint(tmp_path, **settings)
    with pytest.raises(UsageError, match=message):
        quantc.export(packed, to=target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_transformers_cannot_read_is_written_for_vllm(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, bits=8, pins={"*down_proj": 4}, target="vllm")
    exported = quantc.export(packed, to="vllm", out=tmp_path / "out")
    assert exported.schemes == {"w8g32": 12, "w4g32": 2}
    assert exported.agreement is None
    assert exported.notes == [
        "transformers loads no checkpoint with zero points and several widths or group sizes; vLLM does",
        "nothing was verified by another runtime: none that reads it runs here",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "auto-round", "bits": 4}, "auto-round loads symmetric codes alone; pass --symmetric"),
        ({"target": "compressed-tensors", "avg_bits": 4.0}, "loads several widths with symmetric codes alone"),
        ({"target": "awq", "avg_bits": 4.0}, "awq holds one width for all layers; pass --bits"),
        ({"target": "awq", "bits": 3}, "only w4g32, w4g64, w4g128 may be used"),
    ],
)
def test_plans_keep_to_what_the_target_holds(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_with_tokenizer(build("qwen2"), tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        quantc.quantize(tmp_path / "model", out=tmp_path / "out", group_size=32, method="rtn", **settings)


def test_groups_are_chosen_that_the_target_holds(tmp_path: Path) -> None:
    """96 inputs are one group of 96 by default, which no target has."""
    save_with_tokenizer(build("qwen2"), tmp_path / "model")
    for target, found in (("vllm", {"w4g64": 12, "w4g32": 2}), ("mlx", {"w4g64": 12, "w4g32": 2})):
        quantc.quantize(tmp_path / "model", out=tmp_path / target, bits=4, method="rtn", target=target)
        exported = quantc.export(tmp_path / target, to=target)
        assert exported.schemes == found
        # transformers loads no zero points in groups of several sizes, and the card must not say that it does
        said = "vLLM and SGLang" if target == "vllm" else "mlx-lm"
        assert said in exported.readers
        assert f"Read by: {exported.readers}." in (tmp_path / f"{target}-{target}/README.md").read_text()
        assert f"library_name: {target}" in (tmp_path / f"{target}-{target}/README.md").read_text()
        assert "transformers" not in exported.readers
    with pytest.raises(UsageError, match="awq holds one group size, .* pass --group-size 32"):
        quantc.quantize(tmp_path / "model", out=tmp_path / "awq", bits=4, method="rtn", target="awq")
    with pytest.raises(UsageError, match="one group size with zero points, .* pass --group-size 32, or --symmetric"):
        quantc.quantize(tmp_path / "model", out=tmp_path / "ct", bits=4, method="rtn", target="compressed-tensors")
    assert RUNTIMES["vllm"].group_of(100) == -1
    assert RUNTIMES["mlx"].group_of(100) is None


@pytest.mark.parametrize(
    ("symmetric", "readers", "library"),
    [(True, "GPTQModel and vLLM", "library_name: vllm"), (False, "GPTQModel", "tags:")],
)
def test_a_card_names_only_who_loads_this_model(symmetric: bool, readers: str, library: str, tmp_path: Path) -> None:
    """Several widths: transformers does not load them in GPTQ's container, and vLLM none with zero points."""
    packed = checkpoint(tmp_path, bits=8, symmetric=symmetric, pins={"*down_proj": 4})
    assert quantc.export(packed, to="gptq", out=tmp_path / "out").readers == readers
    card = (tmp_path / "out/README.md").read_text()
    assert f"Read by: {readers}." in card
    assert card.startswith(f"---\n{library}")


@pytest.mark.parametrize(
    ("target", "readers", "lines"),
    [
        ("compressed-tensors", ["vLLM", "SGLang", "transformers with compressed-tensors"], "AutoModelForCausalLM."),
        ("compressed-tensors", ["vLLM", "SGLang"], "vllm serve"),
        ("vllm", ["vLLM", "SGLang", "transformers with compressed-tensors"], "vllm serve"),
        ("vllm-rotated", ["vLLM alone, on one GPU"], "vllm serve"),
        ("awq", ["vLLM", "GPTQModel", "mlx-lm"], "GPTQModel.load"),
        ("awq", ["vLLM"], "vllm serve"),
        ("gptq", [], ""),
    ],
)
def test_the_lines_of_a_card_are_of_a_reader_of_this_model(
    target: str, readers: list[str], lines: str, tmp_path: Path
) -> None:
    """One empty line before and after them; where nothing reads the model there are none."""
    card = folder_card(tmp_path, target, readers, 4.0, {"w4g32sym": 1}, tmp_path)
    loading = card.partition("## How to load it\n\n")[2].partition("\n## Licence")[0]
    shown = loading.partition("\n")[2]
    assert lines in shown
    assert bool(shown) is bool(lines)
    assert "\n\n\n" not in card


def test_what_is_planned_for_a_target_can_be_exported_to_it(tmp_path: Path) -> None:
    save_with_tokenizer(build("qwen2"), tmp_path / "model")
    for target in ("vllm", "vllm-rotated", "compressed-tensors", "gptq", "awq", "auto-round", "mlx"):
        out = tmp_path / target
        quantc.quantize(tmp_path / "model", out=out, bits=4, symmetric=True, group_size=32, method="rtn", target=target)
        assert quantc.export(out, to=target).schemes == {"w4g32sym": 14}


def test_the_command_and_the_table() -> None:
    assert set(TARGETS) == set(RUNTIMES)
    shown = CliRunner().invoke(main, ["targets"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    assert all(name in shown.output for name in TARGETS)
    one = CliRunner().invoke(main, ["targets", "vllm", "--json"])
    assert json.loads(one.output)["targets"][0]["container"] == "compressed-tensors"


def test_options_of_gguf_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pre-tokenizer is of GGUF files, and --to is vllm; remove it"):
        quantc.export(tmp_path, to="vllm", pre_tokenizer="gpt-2")
    with pytest.raises(UsageError, match="--to is onnx, which is no target; choose one of gguf, vllm"):
        quantc.export(tmp_path, to="onnx")


def test_a_checkpoint_for_a_target_says_how_it_is_exported(tmp_path: Path) -> None:
    save_with_tokenizer(build("qwen2"), tmp_path / "model")
    words = f"quantize {tmp_path / 'model'} --bits 4 --group-size 32 --method rtn --target vllm --out {tmp_path / 'w4'}"
    shown = CliRunner().invoke(main, words.split(), env={"COLUMNS": "300"})
    assert f"quantc export {tmp_path / 'w4'} --to vllm" in shown.stdout


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "awq", "mlx"])
def test_a_folder_that_holds_other_weights_is_not_named(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, container = checkpoint(tmp_path), CONTAINERS[target]
    parts = container.parts

    def spoiled(tensor: QTensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        found = parts(tensor, dtype)
        name = next(name for name in found if name in ("weight_packed", "qweight", "weight"))
        changed = found[name].view(torch.int32).clone()
        changed[0, 0] ^= 1
        return {**found, name: changed.view(found[name].dtype)}

    monkeypatch.setattr(container, "parts", spoiled)
    with pytest.raises(CheckpointError, match="is read back from the new folder as other weights"):
        quantc.export(packed, to=target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("target", ["vllm", "mlx"])
def test_a_card_says_how_the_folder_is_loaded_and_carries_the_licence(target: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, symmetric=True)
    card = (packed / "README.md").read_text().replace("---\n", "---\nlicense: mit\nbase_model: somebody/tiny\n", 1)
    (packed / "README.md").write_text(card)
    quantc.export(packed, to=target, out=tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["base_model"] == "somebody/tiny"
    assert front["tags"] == ["quantc", target]
    assert f"# somebody/tiny, for {target}" in text
    assert {"vllm": "vllm serve path/to", "mlx": "mlx_lm.generate --model path/to"}[target] in text
    assert "| `w4g32sym` |" in text
    assert "That of the original" in text
