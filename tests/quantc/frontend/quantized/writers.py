"""Small writers of other tools' containers, made from their descriptions and sharing no code with quantc.

Each turns a folder of floats into one that a tool has quantized, and the values that it stands for are kept beside it
as a folder of floats, the twin: both have to be the same model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.families import FAMILIES, randomize
from tests.quantc.frontend.folders import WEIGHTS, edit_config

Tensors = dict[str, torch.Tensor]
# Tensors of one weight, without the module's name, and the values that they stand for.
Packer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # of E2M1
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def build_with(family: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of a family with some settings changed."""
    config = AutoConfig.for_model(FAMILIES[family].model_type, **{**FAMILIES[family].settings, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


def write(
    source: Path, out: Path, pack: Packer, config: dict[str, Any], only: tuple[str, ...] = ("_proj.weight",)
) -> Path:
    """Write `source` with its linears packed as `out`, and out-twin with the floats that this stands for."""
    twin = out.with_name(out.name + "-twin")
    for folder in (out, twin):
        shutil.copytree(source, folder)
    packed: Tensors = {}
    floats: Tensors = {}
    for name, weight in load_file(source / WEIGHTS).items():
        if not name.endswith(only):
            packed[name] = floats[name] = weight
            continue
        module = name.removesuffix(".weight")
        parts, floats[name] = pack(module, weight.float())
        packed |= {f"{module}.{part}": tensor.contiguous().clone() for part, tensor in parts.items()}
    save_file(packed, out / WEIGHTS, metadata={"format": "pt"})
    save_file({k: v.contiguous().clone() for k, v in floats.items()}, twin / WEIGHTS, metadata={"format": "pt"})
    edit_config(out, quantization_config=config)
    return out


def rename(folder: Path, endings: dict[str, str]) -> None:
    """Give tensors whose names end so other endings."""

    def renamed(name: str) -> str:
        old = next((end for end in endings if name.endswith(end)), "")
        return name.removesuffix(old) + endings.get(old, "")

    found = {renamed(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes as one stream of bits each, lowest first, in int32 words."""
    rows, count = codes.shape
    ones = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    ones = np.pad(ones.reshape(rows, count * bits), ((0, 0), (0, -count * bits % 32)))
    return torch.from_numpy(np.packbits(ones.astype(np.uint8), axis=1, bitorder="little").view(np.int32))


def padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of codes with 32 // bits in every int32 word."""
    whole = 32 // bits
    lanes = np.pad(codes.numpy().astype(np.int64), ((0, 0), (0, -codes.shape[1] % whole)))
    lanes = lanes.reshape(codes.shape[0], -1, whole) << (bits * np.arange(whole))
    return torch.from_numpy(lanes.sum(-1).astype(np.uint32).view(np.int32))


def rounded(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, least: int = 0, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int (N, K), zero points int and scales of a dtype (N, G); group 0 is a row, the last may be shorter."""
    group, top = group or weight.shape[1], 2**bits - 1
    codes, zeros, scales = [], [], []
    for part in weight.split(group, 1):
        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        if symmetric:
            scale = (torch.maximum(-low, high) / (top // 2 + 0.5)).to(dtype)
            zero = torch.full_like(low, 2 ** (bits - 1))
        else:
            scale = ((high - low) / top).to(dtype)
            zero = (-low / scale.float()).round().clamp(least, top)
        codes.append(((part / scale.float()).round() + zero).clamp(0, top))
        zeros.append(zero)
        scales.append(scale)
    return torch.cat(codes, 1).int(), torch.cat(zeros, 1).int(), torch.cat(scales, 1)


def values(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """What codes stand for, float32; groups: that of each column."""
    return (codes - zeros[:, groups]).float() * scales[:, groups].float()


def groups_of(columns: int, group: int) -> torch.Tensor:
    return torch.arange(columns) // (group or columns)


def shuffled(module: str, columns: int, group: int) -> torch.Tensor:
    """The groups of columns in another order, as act order leaves them."""
    return groups_of(columns, group)[torch.randperm(columns, generator=torch.Generator().manual_seed(len(module)))]


def ct_integers(
    bits: int, group: int, symmetric: bool = True, words: Any = stream, act_order: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Packer:  # fmt: skip
    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = rounded(weight, bits, group, symmetric, dtype=dtype)
        index = shuffled(module, weight.shape[1], group) if act_order else groups_of(weight.shape[1], group)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zeros.T.contiguous(), bits).T
        if act_order:
            parts["weight_g_idx"] = index.int()
        return parts, values(codes, zeros, scales, index)

    return pack


def gptq(bits: int, group: int, symmetric: bool, version: int, act_order: bool = False, index: bool = True) -> Packer:
    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        less = 2 - version
        codes, zeros, scales = rounded(weight, bits, group, symmetric, least=less)
        of_column = shuffled(module, weight.shape[1], group) if act_order else groups_of(weight.shape[1], group)
        parts = {
            "qweight": stream(codes, bits).T,
            "qzeros": stream(zeros.T.contiguous() - less, bits),
            "scales": scales.T,
        }
        if index or act_order:
            parts["g_idx"] = of_column.int()
        return parts, values(codes, zeros, scales, of_column)

    return pack


def awq(group: int, bits: int = 4) -> Packer:
    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, zeros, scales = rounded(weight, bits, group, symmetric=False)
        parts = {"qweight": _awq_words(codes.T, bits), "qzeros": _awq_words(zeros.T, bits), "scales": scales.T}
        return parts, values(codes, zeros, scales, groups_of(weight.shape[1], group))

    return pack


def _awq_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    inner = codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER]
    return stream(inner.reshape(codes.shape).contiguous(), bits)


def fp8(scale: str, block: tuple[int, int] | str, dtype: torch.dtype = torch.float8_e4m3fn) -> Packer:
    """block: the sides of a block, "row" or "tensor". scale: the last part of the scales' name."""

    def pack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = {"row": (1, weight.shape[1]), "tensor": tuple(weight.shape)}.get(str(block), block)
        codes, found, scales = torch.empty_like(weight), torch.empty_like(weight), []
        for i in range(0, weight.shape[0], rows):
            scales.append([])
            for j in range(0, weight.shape[1], columns):
                part = weight[i : i + rows, j : j + columns]
                step = part.abs().max() / 448
                code = (part / step).to(dtype).float()
                codes[i : i + rows, j : j + columns] = code
                found[i : i + rows, j : j + columns] = code * step
                scales[-1].append(step)
        return {"weight": codes.to(dtype), scale: torch.tensor(scales)}, found

    return pack


def nearest_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of the nearest E2M1 values, and these."""
    code = (weight.abs().unsqueeze(-1) - LEVELS).abs().argmin(-1)
    negative = weight < 0
    return code + 8 * negative, torch.where(negative, -LEVELS[code], LEVELS[code])


def pairs(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def nvfp4(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    largest = weight.abs().max()
    overall = 448 * 6 / largest
    blocks = weight.view(weight.shape[0], -1, 16)
    scales = (blocks.abs().amax(-1) / 6 * overall).to(torch.float8_e4m3fn)
    step = (scales.float() / overall).unsqueeze(-1)
    codes, levels = nearest_fp4(blocks / step)
    parts = {
        "weight_packed": pairs(codes.view(weight.shape)),
        "weight_scale": scales,
        "weight_global_scale": overall.reshape(1),
    }
    return parts, (levels * step).view(weight.shape)


def powers(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exponents of blocks, as bytes, and the powers of two."""
    exponent = (blocks.abs().amax(-1) / 6).log2().ceil()
    return (exponent + 127).to(torch.uint8), 2.0**exponent


def mxfp4(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    blocks = weight.view(weight.shape[0], -1, 32)
    exponents, step = powers(blocks)
    codes, levels = nearest_fp4(blocks / step.unsqueeze(-1))
    parts = {"weight_packed": pairs(codes.view(weight.shape)), "weight_scale": exponents}
    return parts, (levels * step.unsqueeze(-1)).view(weight.shape)


STACKS = ("gate_up_proj", "down_proj")  # of gpt-oss
STACK_PARTS = {"_proj.blocks": "_proj_blocks", "_proj.scales": "_proj_scales"}  # see `rename`


def mxfp4_stack(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Experts (E, K, N), stored with outputs first."""
    blocks = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents, step = powers(blocks)
    codes, levels = nearest_fp4(blocks / step.unsqueeze(-1))
    found = (levels * step.unsqueeze(-1)).flatten(-2).transpose(1, 2)
    return {"blocks": pairs(codes), "scales": exponents}, found


def mxfp8(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    blocks = weight.view(weight.shape[0], -1, 32)
    exponents, step = powers(blocks)
    codes = (blocks / step.unsqueeze(-1)).to(torch.float8_e4m3fn)
    found = (codes.float() * step.unsqueeze(-1)).view(weight.shape)
    return {"weight": codes.view(weight.shape), "weight_scale": exponents}, found


def ct_config(form: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors; each group has its targets, and what its weights are."""
    written = {
        f"group_{i}": {
            "targets": group.pop("targets", ["Linear"]),
            "input_activations": group.pop("input_activations", None),
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, **group},
        }
        for i, group in enumerate(groups)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": written,
        **more,
    }


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content
