"""Folders that another tool has quantized, through the commands: measured, inspected, and quantized again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantc
from quantc.frontend import open_model
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run
from tests.quantc.frontend.folders import WEIGHTS, edit_config
from tests.quantc.frontend.quantized import writers
from tests.quantc.frontend.quantized.writers import ct_config, ct_integers, fp8, write

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 40]}
CT = ct_config("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 8})


@pytest.fixture(autouse=True)
def _quick_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantc.evaluation.scores.measure_decode_speed", lambda *_: 1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("plain") / "model")


def quantize(folder: Path, out: Path, **settings: Any) -> Any:
    text = {"calib": str(folder / "text.txt"), "samples": 4, "seq_len": 32}
    return quantc.quantize(folder, out=out, group_size=8, head_bits="keep", **{**text, **settings})


def evaluate(model: Path, original: Path) -> Any:
    return quantc.evaluate(model, text=str(original / "text.txt"), against=original, context=32, dtype="float32")


def check_same_codes(folder: Path, count: int) -> None:
    """Checkpoints made from a packed folder and from its twin hold the same codes, of so many weights."""
    one, two = (
        {
            name: tensor
            for file in sorted((folder / made).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for made in ("out", "twin")
    )
    assert one.keys() == two.keys()
    codes = [name for name in one if name.endswith(".qweight")]
    assert len(codes) == count
    assert all(torch.equal(one[name], two[name]) for name in codes)


def test_eval_measures_what_the_folder_stores(plain: Path, tmp_path: Path) -> None:
    folder = write(plain, tmp_path / "model", ct_integers(4, 8), CT)
    result, twin = evaluate(folder, plain), evaluate(tmp_path / "model-twin", plain)
    assert result.mean_kl == twin.mean_kl > 0
    assert result.perplexity == twin.perplexity
    assert result.weights_bytes == (folder / WEIGHTS).stat().st_size
    stored = {name: tensor.nbytes for name, tensor in load_file(folder / WEIGHTS).items() if "_proj." in name}
    values = sum(tensor.numel() for name, tensor in load_file(plain / WEIGHTS).items() if "_proj." in name)
    assert result.bits_per_weight == pytest.approx(8 * sum(stored.values()) / values)
    assert 6 < result.bits_per_weight < 6.2  # 4 for a code, 2 for a scale of 8 in bfloat16, and shapes


def test_eval_of_experts_counts_them_all(tmp_path: Path) -> None:
    source = save_with_tokenizer(build("qwen3_moe"), tmp_path / "source")
    folder = write(source, tmp_path / "model", ct_integers(4, 8), CT)
    result = evaluate(folder, source)
    stored = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".layers." in name}
    floats = {name: tensor for name, tensor in load_file(source / WEIGHTS).items() if ".layers." in name}
    matrices = [name.removesuffix(".weight") for name, tensor in floats.items() if tensor.ndim == 2]
    bits = 8 * sum(tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[0] in matrices)
    assert result.bits_per_weight == pytest.approx(bits / sum(floats[f"{name}.weight"].numel() for name in matrices))


def test_inspect_lists_how_weights_are_stored(plain: Path, tmp_path: Path) -> None:
    folder = write(plain, tmp_path / "model", ct_integers(4, 8), CT)
    found = json.loads(run("inspect", str(folder), "--json").stdout)
    assert found["container"] == "compressed-tensors"
    assert found["weights_bytes"] == (folder / WEIGHTS).stat().st_size
    assert len(found["linears"]) == 14
    name = "model.layers.1.mlp.down_proj.weight"
    linear = next(linear for linear in found["linears"] if linear["name"] == name)
    assert linear == {
        "name": name,
        "label": "int4 g8",
        "shape": [64, 104],
        "bits_per_weight": pytest.approx(6.019, abs=0.01),
    }
    shown = " ".join(run("inspect", str(folder), columns=120).stdout.split())
    assert f"{name} int4 g8 64 x 104 6.0" in shown
    assert "container compressed-tensors" in shown
    assert "the weights were quantized before (compressed-tensors: int4 g8; 6.03 bits per weight)" in shown


def test_inspect_of_floats_says_what_is_missing(plain: Path) -> None:
    result = run("inspect", str(plain))
    assert result.exit_code == 1
    assert "report.json cannot be read" in result.stderr


@pytest.mark.parametrize("settings", [{"method": "rtn"}, {"avg_bits": 5.0}], ids=["rtn", "budget"])
def test_quantize_from_fp8(plain: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write(plain, tmp_path / "model", fp8("weight_scale_inv", (16, 40)), FP8)
    edit_config(folder, dtype="bfloat16")
    edit_config(tmp_path / "model-twin", dtype="bfloat16")
    bits = {} if "avg_bits" in settings else {"bits": 6}
    report = quantize(folder, tmp_path / "out", **bits, **settings)
    assert any(note.startswith("the weights were quantized before (fp8: fp8 e4m3 16x40; 8.") for note in report.notes)
    assert "fp8 also rounds activations or caches here; they are computed in floats" in report.notes
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quantc"
    quantize(tmp_path / "model-twin", tmp_path / "twin", **bits, **settings)
    check_same_codes(tmp_path, 14)
    assert evaluate(tmp_path / "out", plain).mean_kl < 0.05


def test_quantize_from_mxfp4_experts(tmp_path: Path) -> None:
    source = save_with_tokenizer(writers.build_with("gpt_oss", intermediate_size=96), tmp_path / "source")
    folder = write(source, tmp_path / "model", writers.mxfp4_stack, {"quant_method": "mxfp4"}, writers.STACKS)
    writers.rename(folder, writers.STACK_PARTS)
    report = quantize(folder, tmp_path / "out", bits=8, method="rtn")
    assert any("(mxfp4: mxfp4; 4.25 bits per weight)" in note for note in report.notes)
    quantize(tmp_path / "model-twin", tmp_path / "twin", bits=8, method="rtn")
    check_same_codes(tmp_path, 12)
    assert evaluate(tmp_path / "out", tmp_path / "model-twin").mean_kl < 0.01


def test_layers_that_are_kept_are_stored_in_the_models_dtype(plain: Path, tmp_path: Path) -> None:
    folder = write(plain, tmp_path / "model", fp8("weight_scale_inv", (16, 40)), FP8)
    edit_config(folder, dtype="bfloat16")
    name = "model.layers.0.mlp.down_proj"
    source = open_model(folder)
    assert source.stored_dtype(f"{name}.weight") == torch.bfloat16
    assert source.stored_bits(f"{name}.weight") == pytest.approx(8 + 32 * 4 * 3 / (64 * 104))
    assert source.stored_bits("model.norm.weight") == 32


def test_fingerprints_are_those_of_the_files(plain: Path, tmp_path: Path) -> None:
    folder = write(plain, tmp_path / "model", fp8("weight_scale_inv", (16, 40)), FP8)
    before = open_model(folder).contents()
    assert set(before) >= {WEIGHTS, "config.json"}
    found = load_file(folder / WEIGHTS)
    found["model.layers.0.mlp.down_proj.weight_scale_inv"].mul_(2)
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    assert open_model(folder).contents()[WEIGHTS] != before[WEIGHTS]


def test_a_checkpoint_of_quantc_is_no_source(plain: Path, tmp_path: Path) -> None:
    quantize(plain, tmp_path / "out", bits=4, method="rtn")
    with pytest.raises(quantc.errors.ModelError, match="already quantized \\(by quantc\\)"):
        open_model(tmp_path / "out")


def test_values_in_half_precision_are_those_of_float32_rounded(plain: Path, tmp_path: Path) -> None:
    folder = write(plain, tmp_path / "model", ct_integers(4, 8), CT)
    exact, half = (open_model(folder).load_whole(dtype) for dtype in (torch.float32, torch.bfloat16))
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in exact.state_dict().items()}
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in half.state_dict().items())
