"""Weights that the compressed-tensors package packs are read as it decompresses them itself, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.transform import TransformArgs, TransformFactory, TransformScheme
from safetensors.torch import load_file

from quantc.frontend import open_model
from tests.families import build
from tests.helpers import save_with_tokenizer, thinned
from tests.quantc.frontend.quantized.writers import Tensors, ct_config, write


def blocks_of(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Each row of scales' weights, (R, C, weights of one scale)."""
    if args.strategy == "tensor":
        return weight.reshape(1, 1, -1)
    if args.strategy == "channel":
        return weight.unsqueeze(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        return weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, args.group_size))


def packer(form: str, weights: dict[str, Any], dtype: torch.dtype) -> Callable[..., tuple[Tensors, torch.Tensor]]:
    """Pack by the package itself; the values are those that it decompresses."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)

    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        weight = weight.to(dtype)
        blocks = blocks_of(weight, args)
        overall = generate_gparam(weight.min(), weight.max()) if form.startswith("nvfp4") else None
        scales, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=overall)
        state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
        if overall is not None:
            state["weight_global_scale"] = overall
        packed = compressor.compress(state, scheme)
        return packed, compressor.decompress(packed, scheme)["weight"]

    return pack


def group(bits: int, size: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size, "symmetric": True, **more}


FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"int{bits}": ("pack-quantized", group(bits, 16)) for bits in range(2, 9)},
    **{f"asym{bits}": ("pack-quantized", group(bits, 16, symmetric=False)) for bits in range(2, 9)},
    "int8 groups": ("pack-quantized", group(8, 32)),
    "rows": ("pack-quantized", {"num_bits": 5, "strategy": "channel", "symmetric": False}),
    "fp8 tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8 rows": ("naive-quantized", {**FP8, "strategy": "channel"}),
    "fp8 blocks": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 16]}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": "torch.float8_e4m3fn"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}  # fmt: skip

SMALL = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("kind", ["hadamard", "random-hadamard"])
def test_inputs_are_turned_as_the_package_turns_them(plain: Path, tmp_path: Path, kind: str) -> None:
    """x times the weight that is read is the package's turned x times the weight that is stored."""
    scheme = TransformScheme(type=kind, head_dim=32, precision=torch.float64)
    inputs, weights = (
        TransformArgs(targets=[DOWN], location=location, inverse=location != "input")
        for location in ("input", "weight_input")
    )
    linear = torch.nn.Linear(96, 64, bias=False, dtype=torch.float64)
    factory = TransformFactory.from_scheme(scheme, name="R4", seed=1)
    turn, turn_weight = (factory.create_transform(linear, each) for each in (inputs, weights))
    pack = packer("pack-quantized", CASES["int8 groups"][1], torch.float32)

    def turned(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if module != DOWN:
            return pack(module, weight)
        parts, stored = pack(module, turn_weight(weight.double()).float())
        return {**parts, "R4_input.weight": turn.weight.float()}, stored

    apply = {"targets": [DOWN], "location": "input", "inverse": False, "ignore": []}
    config = ct_config("pack-quantized", dict(CASES["int8 groups"][1]))
    config["transform_config"] = {"config_groups": {"R4": {"type": kind, "head_dim": 32, "apply": [apply]}}}
    source = open_model(write(plain, tmp_path / "model", turned, config))
    stored = load_file(tmp_path / "model-twin/model.safetensors")[f"{DOWN}.weight"].double()
    source.load(f"{DOWN}.weight")
    found = source.model.get_parameter(f"{DOWN}.weight").double()
    x = torch.randn(5, found.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x @ found.T, turn(x) @ stored.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, stored, atol=1e-3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("qwen3"), tmp_path_factory.mktemp("plain") / "model")


@pytest.mark.parametrize(("name", "dtype"), thinned(list(product(CASES, [torch.float32, torch.bfloat16])), 3))
def test_values_are_those_of_the_package(plain: Path, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    form, weights = CASES[name]
    folder = write(plain, tmp_path / "model", packer(form, weights, dtype), ct_config(form, dict(weights)))
    source, twin = open_model(folder), open_model(tmp_path / "model-twin")
    for name, _ in source.model.named_parameters():
        if name.endswith("_proj.weight"):
            source.load(name)
            twin.load(name)
            # The package computes in the dtype of the scales, and small floats in bfloat16; quantc in float32.
            rounded_to = twin.stored_dtype(name)
            assert rounded_to == (torch.bfloat16 if form in SMALL else dtype)
            found, expected = source.model.get_parameter(name), twin.model.get_parameter(name)
            assert torch.equal(found.to(rounded_to), expected.to(rounded_to)), name
