"""NVFP4, MXFP4 and FP8 in compressed-tensors folders: what transformers unpacks, and units of fused layers."""

from __future__ import annotations

import json
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
from quantc.errors import UsageError
from quantc.export.folders.units import in_unit
from quantc.numerics.grids import fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.planning.formats import Formats
from quantc.planning.settings import AllocateConfig
from quantc.spec import QuantSpec, spec_of_label
from tests.helpers import save_with_tokenizer, thinned
from tests.quantc.export.test_folders import checkpoint, logits
from tests.quantc.export.tiny import build

FORMS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "fp8-grow": "naive-quantized"}
FREE: dict[str, Any] = {"bits": None, "group_size": None}


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize("dtype", thinned([torch.bfloat16, torch.float32], every=2))
@pytest.mark.parametrize("label", FORMS)
def test_transformers_computes_the_same(label: str, dtype: torch.dtype, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "qwen3", dtype, formats=[label], target="compressed-tensors", **FREE)
    exported = quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    assert exported.agreement is not None
    assert exported.agreement.error < 1e-6
    assert exported.schemes == {label: 14}
    assert torch.tensor([], dtype=dtype).dtype == getattr(torch, exported.dtype)
    assert settings_of(tmp_path / "out")["format"] == FORMS[label]
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = logits(quantc.load(packed, dtype=torch.float32))
    assert torch.allclose(logits(other), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def mixed_plan(folder: Path, model: str, dtype: torch.dtype, labels: list[str]) -> Path:
    """Return a checkpoint whose layers have formats in turn; experts have the first."""
    built = build(model).to(dtype)
    save_with_tokenizer(built, folder / "model")
    names = [name.removesuffix(".weight") for name, _ in built.named_parameters() if "_proj" in name]
    specs = [spec_of_label(labels[0 if "experts" in name else at % len(labels)]) for at, name in enumerate(names)]
    plan = {name: spec.with_scales("bfloat16").to_dict() for name, spec in zip(names, specs, strict=True) if spec}
    (folder / "plan.yaml").write_text(yaml.safe_dump({"version": 1, "linears": plan}))
    quantc.quantize(folder / "model", out=folder / "packed", plan=folder / "plan.yaml", preset="fast", method="rtn")
    return folder / "packed"


@pytest.mark.parametrize(
    ("model", "labels"),
    thinned(
        [
            ("qwen3", ["nvfp4", "mxfp4", "fp8-grow", "w4g32sym", "w8g32sym"]),
            ("mixtral", ["mxfp4", "fp8-grow", "nvfp4", "w3g32sym"]),
            ("mixtral", ["fp8-grow", "w4g32sym"]),
        ],
        every=3,
    ),
)
def test_formats_beside_each_other(model: str, labels: list[str], tmp_path: Path) -> None:
    packed = mixed_plan(tmp_path, model, torch.bfloat16, labels)
    exported = quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    assert exported.agreement is not None
    assert exported.agreement.error < 1e-5
    assert exported.dtype == "bfloat16"
    assert settings_of(tmp_path / "out")["format"] == "mixed-precision"


def test_a_note_says_what_transformers_needs(tmp_path: Path) -> None:
    packed = mixed_plan(tmp_path, "qwen3", torch.float32, ["mxfp4", "w4g32sym"])
    notes = quantc.export(packed, to="compressed-tensors", out=tmp_path / "out").notes
    assert notes == ["transformers unpacks 4-bit floats into bfloat16, so load the model in that dtype there"]


def test_layers_that_vllm_multiplies_at_once_share_a_unit(tmp_path: Path) -> None:
    model = build("qwen3")
    with torch.no_grad():
        keys = model.get_submodule("model.layers.0.self_attn.k_proj").weight.mul_(0.2)
        keys[0] *= 4e-5  # whose scales are below the normal numbers of E4M3
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(3.0)
    save_with_tokenizer(model, tmp_path / "model")
    quantize: dict[str, Any] = {"formats": ["nvfp4"], "preset": "fast", "method": "rtn"}
    quantc.quantize(tmp_path / "model", out=tmp_path / "w4", target="vllm", **quantize)
    exported = quantc.export(tmp_path / "w4", to="vllm", out=tmp_path / "out")
    assert exported.agreement is not None
    assert exported.agreement.error < 1e-6
    tensors = load_file(next((tmp_path / "out").glob("*.safetensors")))
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        units = {float(tensors[f"model.layers.0.{name}.weight_global_scale"]) for name in names}
        assert len(units) == 1
    assert exported.notes == ["the smallest NVFP4 scales of 1 layer were rounded, to share a unit with layers "
                              "multiplied at once"]  # fmt: skip
    quantc.quantize(tmp_path / "model", out=tmp_path / "free", head_bits="keep", **quantize)
    with pytest.raises(UsageError, match="their NVFP4 scales have different units; .* with --target vllm"):
        quantc.export(tmp_path / "free", to="vllm", out=tmp_path / "out2")


def test_scales_in_a_larger_unit_are_as_exact() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[0] *= 1e-5
    spec = QuantSpec(4, 16, code="nvfp4", scale_dtype="bfloat16")
    parameters = fit_grid(weight, spec)
    tensor = QTensor.of(spec, round_to_nearest(weight, parameters, spec), parameters)
    unit = float(tensor.more["tensor_scale"])
    moved = in_unit(tensor, unit * 4)
    assert float(moved.more["tensor_scale"]) == unit * 4
    assert torch.equal(moved.dequantize()[1:], tensor.dequantize()[1:])
    assert float((moved.dequantize() - tensor.dequantize()).abs().max()) <= 6 * unit * 4 * 2.0**-10


@pytest.mark.parametrize("label", thinned(list(FORMS), every=3, at=1))
def test_experts_are_small_floats_too(label: str, tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "mixtral", formats=[label], target="vllm", **FREE)
    exported = quantc.export(packed, to="vllm", out=tmp_path / "out")
    assert exported.schemes == {label: 12}
    if label == "nvfp4":
        assert any("drops a factor of the scales of experts in NVFP4" in note for note in exported.notes)
    else:
        assert exported.agreement is not None
        assert exported.agreement.error < 1e-6


def test_what_transformers_reads_wrongly_is_refused(tmp_path: Path) -> None:
    packed = checkpoint(tmp_path, "mixtral", formats=["nvfp4"], **FREE)
    with pytest.raises(UsageError, match="experts in nvfp4, of whose scales its readers drop a factor; .* mxfp4"):
        quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    with pytest.raises(UsageError, match="compressed-tensors holds no experts in nvfp4, .*; pass --formats mxfp4"):
        checkpoint(tmp_path / "again", "mixtral", formats=["nvfp4"], target="compressed-tensors", **FREE)


def test_a_budget_chooses_among_them(tmp_path: Path) -> None:
    text = {"calib": str(tmp_path / "model/text.txt"), "samples": 4, "seq_len": 32, "method": None}
    formats = {"formats": ["nvfp4", "fp8-grow"], "avg_bits": 6.0, "target": "compressed-tensors"}
    packed = checkpoint(tmp_path, "qwen3", torch.bfloat16, **FREE, **text, **formats)
    exported = quantc.export(packed, to="compressed-tensors", out=tmp_path / "out")
    assert set(exported.schemes) == {"nvfp4", "fp8-grow"}
    assert exported.agreement is not None
    assert exported.agreement.error < 1e-6


def test_the_table_names_them() -> None:
    for target in ("vllm", "compressed-tensors"):
        shown = CliRunner().invoke(main, ["targets", target, "--json"])
        assert json.loads(shown.output)["targets"][0]["other formats"] == "nvfp4, mxfp4, fp8-grow"
    with pytest.raises(UsageError, match="mlx does not load nvfp4; it loads w2g32, w2g64"):
        Formats(AllocateConfig(target="mlx", formats=("nvfp4",), size=1 << 20)).rules()
