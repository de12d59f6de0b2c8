"""Every container is read as the floats that it stands for: the model is that of its twin, to the bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.frontend import open_model
from tests.families import build
from tests.helpers import save_with_tokenizer, thinned
from tests.quantc.frontend.folders import shard
from tests.quantc.frontend.quantized import writers
from tests.quantc.frontend.quantized.writers import (
    awq,
    ct_config,
    ct_integers,
    fp8,
    gptq,
    mxfp4,
    mxfp8,
    nvfp4,
    padded,
    write,
)  # fmt: skip

ASYM = {"symmetric": False}


def ct_group(bits: int, group: int, **more: Any) -> dict[str, Any]:
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    return {"num_bits": bits, **strategy, **more}


def gptq_config(bits: int, group: int, form: str = "gptq", **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "checkpoint_format": form, **more}


def check_twin(folder: Path) -> None:
    """The folder's model has the twin's tensors, block by block and whole, and its logits."""
    source, twin = open_model(folder), open_model(folder.with_name(folder.name + "-twin"))
    for name, parameter in source.model.named_parameters():
        source.load(name)
        twin.load(name)
        found, expected = source.model.get_parameter(name), twin.model.get_parameter(name)
        assert torch.equal(found, expected), name
        assert parameter.shape == found.shape
    whole, expected_whole = source.load_whole(torch.float32), twin.load_whole(torch.float32)
    tokens = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        logits, expected = (model(input_ids=tokens).logits for model in (whole, expected_whole))
    # transformers' own way of running experts differs from the one that tells them apart.
    assert (logits - expected).norm() < 1e-5 * expected.norm()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("plain") / "model")


# Rows are 64 and 104 long: groups of 24 have a short last one.
INTEGERS = list(product(range(2, 9), [True, False], [0, 8, 24]))


@pytest.mark.parametrize(("bits", "symmetric", "group"), thinned(INTEGERS, 5))
def test_ct_integers(plain: Path, tmp_path: Path, bits: int, symmetric: bool, group: int) -> None:
    config = ct_config("pack-quantized", ct_group(bits, group, symmetric=symmetric))
    folder = write(plain, tmp_path / "model", ct_integers(bits, group, symmetric), config)
    check_twin(folder)
    notes = open_model(folder).notes
    assert len(notes) == 1
    label = f"int{bits}" + (f" g{group}" if group else "")
    assert notes[0].startswith(f"the weights were quantized before (compressed-tensors: {label}; ")
    assert notes[0].endswith("quantizing them again adds to that loss")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_ct_integers_of_older_versions(plain: Path, tmp_path: Path, bits: int, symmetric: bool) -> None:
    config = ct_config("pack-quantized", ct_group(bits, 8, symmetric=symmetric))
    check_twin(write(plain, tmp_path / "model", ct_integers(bits, 8, symmetric, padded), config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ct_act_order_and_dtypes_of_scales(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    config = ct_config("pack-quantized", ct_group(4, 8, actorder="group", **ASYM))
    check_twin(write(plain, tmp_path / "model", ct_integers(4, 8, False, act_order=True, dtype=dtype), config))


def test_ct_groups_by_name_expression_and_class(plain: Path, tmp_path: Path) -> None:
    schemes = {"self_attn.v_proj": (8, 0, True), "mlp": (3, 8, False), "": (4, 8, True)}

    def pack(module: str, weight: torch.Tensor) -> Any:
        bits, group, symmetric = next(scheme for part, scheme in schemes.items() if part in module)
        return ct_integers(bits, group, symmetric)(module, weight)

    config = ct_config(
        "pack-quantized",
        ct_group(4, 8),
        ct_group(3, 8, targets=["re:.*mlp.*"], **ASYM),
        ct_group(8, 0, targets=[f"model.layers.{i}.self_attn.v_proj" for i in range(2)]),
    )
    folder = write(plain, tmp_path / "model", pack, config)
    check_twin(folder)
    assert "(compressed-tensors: int3 g8, int4 g8, int8; " in open_model(folder).notes[0]


FP8 = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("pack", "weights", "form"),
    [
        (fp8("weight_scale", "tensor"), {**FP8, "strategy": "tensor"}, "float-quantized"),
        (fp8("weight_scale", "row"), {**FP8, "strategy": "channel"}, "naive-quantized"),
        (fp8("weight_scale", (24, 40)), {**FP8, "strategy": "block", "block_structure": [24, 40]}, "float-quantized"),
        (fp8("weight_scale", (1, 8)), {**FP8, "strategy": "group", "group_size": 8}, "naive-quantized"),
    ],
    ids=["tensor", "channel", "block", "group"],
)
def test_ct_fp8(plain: Path, tmp_path: Path, pack: Any, weights: dict[str, Any], form: str) -> None:
    check_twin(write(plain, tmp_path / "model", pack, ct_config(form, dict(weights))))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ct_int8(plain: Path, tmp_path: Path, symmetric: bool) -> None:
    def pack(module: str, weight: torch.Tensor) -> Any:
        codes, zeros, scales = writers.rounded(weight, 8, 0, symmetric)
        parts = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
        if not symmetric:
            parts["weight_zero_point"] = (zeros - 128).to(torch.int8)
        return parts, writers.values(codes, zeros, scales, writers.groups_of(weight.shape[1], 0))

    group = {"num_bits": 8, "strategy": "channel", "symmetric": symmetric, "input_activations": {"num_bits": 8}}
    folder = write(plain, tmp_path / "model", pack, ct_config("int-quantized", group))
    check_twin(folder)
    assert (
        "compressed-tensors also rounds activations or caches here; they are computed in floats"
        in (open_model(folder).notes[1])
    )


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole blocks of 32."""
    return save_with_tokenizer(build("qwen3"), tmp_path_factory.mktemp("even") / "model")


@pytest.mark.parametrize(
    ("pack", "form", "weights"),
    [
        (nvfp4, "nvfp4-pack-quantized", {"type": "float", "strategy": "tensor_group", "group_size": 16}),
        (mxfp4, "mxfp4-pack-quantized", {"type": "float", "strategy": "group", "group_size": 32}),
        (mxfp8, "mxfp8-quantized", {**FP8, "strategy": "group", "group_size": 32}),
    ],
    ids=["nvfp4", "mxfp4", "mxfp8"],
)
def test_ct_small_floats(even: Path, tmp_path: Path, pack: Any, form: str, weights: dict[str, Any]) -> None:
    check_twin(write(even, tmp_path / "model", pack, ct_config(form, dict(weights))))


GPTQ = list(product([2, 3, 4, 8], [1, 2], [(True, False), (False, False), (False, True)]))


@pytest.mark.parametrize(("bits", "version", "kind"), thinned(GPTQ, 5))
def test_gptq(even: Path, tmp_path: Path, bits: int, version: int, kind: tuple[bool, bool]) -> None:
    symmetric, act_order = kind
    config = gptq_config(bits, 16, "gptq" if version == 1 else "gptq_v2", desc_act=act_order, sym=symmetric)
    check_twin(write(even, tmp_path / "model", gptq(bits, 16, symmetric, version, act_order), config))


def test_gptq_without_g_idx_and_with_rows_as_groups(even: Path, tmp_path: Path) -> None:
    check_twin(write(even, tmp_path / "rows", gptq(4, 0, False, 1, index=False), gptq_config(4, 0)))
    check_twin(write(even, tmp_path / "short", gptq(4, 40, False, 1, index=False), gptq_config(4, 40)))


def test_gptq_dynamic(even: Path, tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> Any:
        bits, group = (8, 32) if "down_proj" in module else (3, 8) if "layers.1" in module else (4, 16)
        return gptq(bits, group, True, 1)(module, weight)

    dynamic = {
        r"+:.*\.down_proj$": {"bits": 8, "group_size": 32},
        r"model\.layers\.1\.": {"bits": 3, "group_size": 8},
        r"-:.*\.nothing$": {},
    }
    check_twin(write(even, tmp_path / "model", pack, gptq_config(4, 16, dynamic=dynamic)))


def test_gptq_of_older_tools(even: Path, tmp_path: Path) -> None:
    folder = write(even, tmp_path / "model", gptq(4, 16, False, 1), {})
    text = (folder / "config.json").read_text().replace('"quantization_config": {}', '"remark": ""')
    (folder / "config.json").write_text(text)
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "desc_act": false}')
    check_twin(folder)


def test_gptq_of_transposed_weights(tmp_path: Path) -> None:
    source = save_with_tokenizer(build("gpt2"), tmp_path / "source")

    def pack(module: str, weight: torch.Tensor) -> Any:
        parts, found = gptq(4, 0, True, 1)(module, weight.T.contiguous())
        return parts, found.T

    check_twin(write(source, tmp_path / "model", pack, gptq_config(4, 0), ("c_fc.weight",)))


@pytest.mark.parametrize("group", [0, 16, 40])
def test_awq(even: Path, tmp_path: Path, group: int) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True, "version": "gemm"}
    check_twin(write(even, tmp_path / "model", awq(group), config))


@pytest.mark.parametrize(
    ("form", "bits", "pack"),
    [
        ("auto_round:auto_gptq", 4, gptq(4, 16, False, 1)),
        ("auto_round:gptqmodel", 4, gptq(4, 16, False, 2)),
        ("auto_round:auto_awq", 4, awq(16)),
        ("auto_round", 5, gptq(5, 16, True, 2)),
        ("auto_round:auto_awq", 3, awq(16, 3)),
    ],
)
def test_auto_round(even: Path, tmp_path: Path, form: str, bits: int, pack: Any) -> None:
    config = {"quant_method": "auto-round", "bits": bits, "group_size": 16, "sym": False, "packing_format": form}
    check_twin(write(even, tmp_path / "model", pack, config))


def test_auto_round_with_extra_settings(even: Path, tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> Any:
        bits, group = (8, 32) if module == "model.layers.0.mlp.up_proj" else (2, 16) if "mlp" in module else (4, 16)
        return gptq(bits, group, True, 1)(module, weight)

    extra = {
        ".*mlp.*": {"bits": 2},
        "model.layers.0.mlp.up_proj": {"bits": 8, "group_size": 32},
        "lm_head": {"bits": 16},
    }
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": True, "extra_config": extra}
    check_twin(write(even, tmp_path / "model", pack, config))


@pytest.mark.parametrize("block", [(16, 40), "row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8(plain: Path, tmp_path: Path, block: Any, dtype: torch.dtype) -> None:
    size = list(block) if isinstance(block, tuple) else None
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    check_twin(write(plain, tmp_path / "model", fp8("weight_scale_inv", block, dtype), config))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("pack", "config"),
    [
        (ct_integers(3, 8, False), ct_config("pack-quantized", ct_group(3, 8, **ASYM))),
        (fp8("weight_scale_inv", (16, 40)), {"quant_method": "fp8", "weight_block_size": [16, 40]}),
    ],
    ids=["ct", "fp8"],
)
def test_experts(tmp_path: Path, family: str, pack: Any, config: dict[str, Any]) -> None:
    source = save_with_tokenizer(build(family), tmp_path / "source")
    experts = {"mixtral": (".w1.weight", ".w2.weight", ".w3.weight"), "qwen3_moe": ("_proj.weight",)}[family]
    check_twin(write(source, tmp_path / "model", pack, config, experts))


def test_stacks_of_gpt_oss(tmp_path: Path) -> None:
    source = save_with_tokenizer(writers.build_with("gpt_oss", intermediate_size=96), tmp_path / "source")

    folder = write(source, tmp_path / "model", writers.mxfp4_stack, {"quant_method": "mxfp4"}, writers.STACKS)
    writers.rename(folder, writers.STACK_PARTS)
    check_twin(folder)


def test_shards(plain: Path, tmp_path: Path) -> None:
    config = ct_config("pack-quantized", ct_group(4, 8, **ASYM))
    folder = write(plain, tmp_path / "model", ct_integers(4, 8, False), config)
    shard(folder, 3)  # the parts of a weight are in different files
    check_twin(folder)


def test_a_tied_head(tmp_path: Path) -> None:
    source = save_with_tokenizer(build("qwen2"), tmp_path / "source")
    folder = write(source, tmp_path / "model", gptq(4, 0, True, 1, index=False), gptq_config(4, 0))
    check_twin(folder)
    assert open_model(folder).tied


def test_a_packed_head_and_embedding(plain: Path, tmp_path: Path) -> None:
    def pack(module: str, weight: torch.Tensor) -> Any:
        return ct_integers(8 if "embed" in module else 4, 8)(module, weight)

    config = ct_config("pack-quantized", ct_group(4, 8), ct_group(8, 8, targets=["Embedding"]), ignore=[])
    check_twin(write(plain, tmp_path / "model", pack, config, ("lm_head.weight", "embed_tokens.weight")))
