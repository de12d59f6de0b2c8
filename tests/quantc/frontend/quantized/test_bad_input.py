"""What a quantized folder may have wrong, and the sentence that says so; nothing is left behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.errors import ModelError
from quantc.frontend import open_model
from quantc.progress import LogProgress
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.frontend.folders import edit_config, edit_weights, refusal
from tests.quantc.frontend.quantized.writers import (
    Tensors,
    awq,
    config_of,
    ct_config,
    ct_integers,
    fp8,
    gptq,
    nvfp4,
    write,
)  # fmt: skip

UP = "model.layers.1.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
CT = ct_config("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False})
FOLDERS: dict[str, Any] = {
    "gptq": (gptq(4, 16, False, 1, act_order=True), GPTQ),
    "awq": (awq(16), {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "ct": (ct_integers(4, 16, False), CT),
    "fp8": (fp8("weight_scale_inv", (16, 40)), {"quant_method": "fp8", "weight_block_size": [16, 40]}),
    "nvfp4": (nvfp4, ct_config("nvfp4-pack-quantized", {"type": "float", "group_size": 16})),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("written")
    source = save_with_tokenizer(build("qwen3"), base / "source")
    return {name: write(source, base / name, pack, config) for name, (pack, config) in FOLDERS.items()}


@pytest.fixture
def folder_of(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(written[name], tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "lost", "owner"),
    [
        ("gptq", "scales", "weight"), ("gptq", "qzeros", "weight"), ("awq", "scales", "weight"),
        ("ct", "weight_scale", "weight"), ("ct", "weight_zero_point", "weight"), ("ct", "weight_shape", "weight"),
        ("fp8", "weight_scale_inv", "weight"), ("nvfp4", "weight_global_scale", "weight"),
    ],
)  # fmt: skip
def test_a_missing_part(folder_of: Any, tmp_path: Path, name: str, lost: str, owner: str) -> None:
    folder = folder_of(name)
    edit_weights(folder, lambda found: found.__delitem__(f"{UP}.{lost}"))
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: {UP}.{lost} is not in the checkpoint, without which {UP}.{owner} cannot be read; a complete "
        "checkpoint is needed, so fetch or save the model again."
    )


@pytest.mark.parametrize(("name", "lost"), [("gptq", "qweight"), ("awq", "qweight"), ("ct", "weight_packed")])
def test_missing_codes(folder_of: Any, tmp_path: Path, name: str, lost: str) -> None:
    folder = folder_of(name)
    edit_weights(folder, lambda found: found.__delitem__(f"{UP}.{lost}"))
    message = refusal(folder, tmp_path / "out")
    assert message.startswith(f"{folder}: {UP}.")
    assert "belongs to a packed weight of which the rest is not in the checkpoint; a complete" in message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gptq", "scales"), ("gptq", "qzeros"), ("awq", "qzeros"), ("ct", "weight_scale"), ("ct", "weight_packed"),
        ("ct", "weight_zero_point"), ("fp8", "weight_scale_inv"), ("nvfp4", "weight_scale"),
    ],
)  # fmt: skip
def test_parts_of_other_shapes(folder_of: Any, tmp_path: Path, name: str, part: str) -> None:
    folder = folder_of(name)

    def cut(found: Tensors) -> None:
        found[f"{UP}.{part}"] = found[f"{UP}.{part}"][:, 1:].contiguous()

    edit_weights(folder, cut)
    message = refusal(folder, tmp_path / "out")
    assert f"{folder}: {UP}.{part} has the shape (" in message
    assert message.endswith("is needed; a quantization_config that belongs to the weights is needed.")


def test_another_width_than_the_config_says(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("gptq")
    edit_config(folder, quantization_config={**GPTQ, "bits": 8})
    assert "has the shape (" in refusal(folder, tmp_path / "out")


def test_a_part_of_another_dtype(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("gptq")
    edit_weights(folder, lambda found: found.update({f"{UP}.qzeros": found[f"{UP}.qzeros"].float()}))
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: {UP}.qzeros is F32, but I32 is needed; weights that belong to the quantization_config are needed."
    )


def test_a_g_idx_that_names_no_group(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("gptq")
    edit_weights(folder, lambda found: found[f"{UP}.g_idx"].add_(1))
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: {UP}.g_idx has numbers from 1 to 4, but there are 4 groups; fetch or save the model again."
    )


def test_a_shape_that_is_not_that_of_the_codes(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("ct")
    edit_weights(folder, lambda found: found[f"{UP}.weight_shape"].copy_(torch.tensor([7, 64])))
    assert refusal(folder, tmp_path / "out") == (
        f"{folder}: {UP}.weight_shape says (7, 64), but {UP}.weight_packed has 96 rows; fetch or save the model again."
    )


def test_scales_that_are_no_numbers(folder_of: Any) -> None:
    folder = folder_of("gptq")
    edit_weights(folder, lambda found: found[f"{UP}.scales"].view(-1)[0].fill_(torch.nan))
    with pytest.raises(ModelError, match=f"1 of 384 values of {UP}.scales are NaN or infinite"):
        open_model(folder).check_values(LogProgress())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "marlin-24"}, "is already quantized with compressed-tensors' format marlin-24, which quantc does"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "with compressed-tensors' format sparse-24-bitmask"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "says W4A16 ['Linear'], but a mapping of"),
        ({"config_groups": 3}, "quantization_config in config.json says config_groups 3, but a mapping of a text to"),
        ({"config_groups": {}}, "model.layers.0.mlp.down_proj is stored packed, but no config group of"),
        (
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input", "targets": ["x"]}]}}}},
            "is already quantized with the online transform R4 (transform_config, location input), which quantc does",
        ),
    ],
)  # fmt: skip
def test_settings_of_ct(folder_of: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = folder_of("ct")
    edit_config(folder, quantization_config={**config_of(folder), **change})
    assert said in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_bits": 9}, "says num_bits 9, but a number of bits from 2 to 8 is needed; use the config that belongs"),
        ({"num_bits": "four"}, "says num_bits 'four', but a whole number is needed"),
        ({"group_size": 0}, "says group_size 0, but a group size of at least 1, or -1 for whole rows is needed"),
        ({"strategy": "token"}, "says strategy 'token', but tensor or channel or group or tensor_group or block is"),
        ({"strategy": "block"}, "has no block_structure, without which the weights cannot be read"),
    ],
)
def test_weights_of_a_ct_group(folder_of: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = folder_of("ct")
    config = copy.deepcopy(config_of(folder))
    config["config_groups"]["group_0"]["weights"].update(change)
    edit_config(folder, quantization_config=config)
    assert said in refusal(folder, tmp_path / "out")


def test_transforms_in_the_weights_are_read(folder_of: Any) -> None:
    folder = folder_of("ct")
    transforms = {"config_groups": {"R1": {"apply": [{"location": "weight_output", "targets": ["x"]}]}}}
    edit_config(folder, quantization_config={**config_of(folder), "transform_config": transforms})
    assert len(open_model(folder).notes) == 1


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gptq", {"checkpoint_format": "gptq_p"}, "is already quantized with gptq's checkpoint_format gptq_p, which"),
        ("gptq", {"dynamic": {"(": {}}}, "dynamic", ),
        ("gptq", {"bits": None}, "quantization_config in config.json has no bits, without which the weights cannot"),
        ("awq", {"version": "gemv_fast"}, "is already quantized with awq's version gemv_fast, which quantc does not"),
        ("awq", {"bits": 8}, "qweight has the shape (96, 8), but (96, 16) is needed; a quantization_config that"),
        ("fp8", {"weight_block_size": [0, 128]}, "weight_block_size [0, 128], but a list of two sizes of at least 1"),
        ("gptq", {"quant_method": "auto-round", "packing_format": "auto_round:x"}, "packing_format auto_round:x"),
    ],
)  # fmt: skip
def test_settings_of_others(folder_of: Any, tmp_path: Path, name: str, change: dict[str, Any], said: str) -> None:
    folder = folder_of(name)
    edit_config(folder, quantization_config={**config_of(folder), **change})
    message = refusal(folder, tmp_path / "out")
    assert ("'(', which is no regular expression (" if said == "dynamic" else said) in message


def test_a_config_of_an_older_tool_that_is_damaged(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("gptq")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "quantize_config.json").write_text("[")
    assert "quantize_config.json is not readable (" in refusal(folder, tmp_path / "out")
    (folder / "quantize_config.json").write_text("[]")
    assert "quantize_config.json is no mapping of settings; fetch it again." in refusal(folder, tmp_path / "out")
