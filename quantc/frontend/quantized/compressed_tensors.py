"""compressed-tensors folders: packed integers, FP4 with scales in E4M3 or powers of two, and plain 8-bit codes.

Read in compressed-tensors 0.20: compressors/pack_quantized, nvfp4, mxfp4, mxfp8 and naive_quantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil

import torch

from ...errors import ModelError
from .base import Container, Packed, Parts, register
from .codes import affine, fp4, to_float, unpack_words, word_counts
from .scaled import FLOAT8, scaled_tensor
from .schemes import Scheme, Schemes
from .settings import Settings
from .stored import Shape, Stored
from .transforms import Transforms

FORMATS = (
    "pack-quantized", "naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
)  # fmt: skip
FLOAT_SCALES = ("F32", "BF16", "F16")
NVFP4_GROUP, MXFP4_GROUP = 16, 32


@register
class CompressedTensors(Container):
    """What a module is stored as shows in the dtypes of its tensors; its group has the width and the group size."""

    methods = ("compressed-tensors",)
    beside = frozenset(
        ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "k_scale",
         "v_scale", "q_scale", "k_zero_point", "v_zero_point", "q_zero_point", "k_global_scale", "v_global_scale")
    )  # fmt: skip

    def __init__(self, settings: Settings):
        super().__init__(settings)
        sparsity = settings.inside("sparsity_config")
        groups = settings.inside("config_groups")
        each = [group for _, group in groups.each()] if groups else []
        for formats in (settings, *each, *([sparsity] if sparsity else [])):
            form = formats.get("format", str, "dense")
            if form not in FORMATS:
                raise settings.unread(f"compressed-tensors' format {form}")
        self._schemes, self._transforms = Schemes(settings), Transforms(settings)
        self.rounds_activations = self._schemes.rounds_activations or settings.get("kv_cache_scheme", dict) is not None

    def packed(self, stored: Stored) -> Iterator[Packed]:
        for module in stored.modules("weight_packed"):
            scheme = self._schemes.of(stored, module)
            floats = stored.headers[f"{module}.weight_packed"].dtype == "U8"
            packed = _fp4(stored, module, scheme) if floats else _integers(stored, module, scheme)
            yield self._transforms.turned(stored, module, packed)
        for module in stored.modules("weight"):
            name = f"{module}.weight"
            if stored.headers[name].dtype in (*FLOAT8, "I8"):
                scheme = self._schemes.of(stored, module)
                zeros = None if scheme.symmetric else f"{name}_zero_point"
                packed = scaled_tensor(stored, name, f"{name}_scale", scheme.block, zeros)
                yield self._transforms.turned(stored, module, packed)
            else:
                self._transforms.refuse(stored, module)


def _integers(stored: Stored, module: str, scheme: Scheme) -> Packed:
    weight = f"{module}.weight"
    parts = {part: f"{weight}_{part}" for part in ("packed", "scale")}
    rows, *_ = stored.part(parts["packed"], ("I32",), weight).shape
    stored.part(parts["scale"], FLOAT_SCALES, weight)
    n, k = shape = _shape(stored, weight, parts)
    if n != rows:
        raise _wrong_shape(stored, weight, shape)
    groups = ceil(k / scheme.group_size) if scheme.group_size else 1
    stored.check_shape(parts["packed"], [(n, count) for count in word_counts(k, scheme.bits)])
    stored.check_shape(parts["scale"], _of_groups(n, groups, scheme))
    if not scheme.symmetric:
        parts["zero_point"] = f"{weight}_zero_point"
        stored.part(parts["zero_point"], ("I32",), weight)
        stored.check_shape(parts["zero_point"], [(count, groups) for count in word_counts(n, scheme.bits)])
    if f"{weight}_g_idx" in stored.headers:
        parts["g_idx"] = f"{weight}_g_idx"
        stored.part(parts["g_idx"], ("I32", "I64"), weight)
        stored.check_shape(parts["g_idx"], [(k,)])
        stored.check_g_idx(parts["g_idx"], groups)
    label = f"int{scheme.bits}" + (f" g{scheme.group_size}" if scheme.group_size else "")
    return Packed(weight, (n, k), parts, label, partial(_decode_integers, (n, k), scheme))


def _of_groups(n: int, groups: int, scheme: Scheme) -> list[Shape]:
    if scheme.group_size:
        return [(n, groups)]
    return [(n, 1), (n,)] if scheme.block[0] else [(1, 1), (1,), ()]


def _shape(stored: Stored, weight: str, parts: dict[str, str]) -> tuple[int, int]:
    """Return the rows and columns that `weight_shape` holds; raises ModelError."""
    parts["shape"] = f"{weight}_shape"
    stored.part(parts["shape"], ("I64", "I32"), weight)
    stored.check_shape(parts["shape"], [(2,)])
    n, k = stored.value(parts["shape"]).tolist()
    if min(n, k) < 1:
        raise _wrong_shape(stored, weight, (n, k))
    return n, k


def _wrong_shape(stored: Stored, weight: str, shape: Shape) -> ModelError:
    return ModelError(
        f"{stored.folder}: {weight}_shape says {shape}, but {weight}_packed has "
        f"{stored.headers[f'{weight}_packed'].shape[0]} rows; fetch or save the model again."
    )


def _decode_integers(shape: tuple[int, int], scheme: Scheme, parts: Parts) -> torch.Tensor:
    """Return (codes - zeros) * scales of the group of each column; see Packed."""
    n, k = shape
    codes = unpack_words(parts["packed"], scheme.bits, k)
    zeros: torch.Tensor | int = 1 << (scheme.bits - 1)
    if "zero_point" in parts:
        zeros = unpack_words(parts["zero_point"].T, scheme.bits, n).T
    scales = parts["scale"].reshape(-1, 1) if not scheme.group_size else parts["scale"]
    return affine(codes, zeros, scales, scheme.group_size, parts.get("g_idx"))


def _fp4(stored: Stored, module: str, scheme: Scheme) -> Packed:
    """Return E2M1 weights: NVFP4 where scales are E4M3, with one that all of those are divided by; else MXFP4."""
    weight = f"{module}.weight"
    parts = {part: f"{weight}_{part}" for part in ("packed", "scale")}
    n, packed = stored.headers[parts["packed"]].shape
    nvidia = stored.part(parts["scale"], ("F8_E4M3", "U8", "F8_E8M0"), weight).dtype == "F8_E4M3"
    size = NVFP4_GROUP if nvidia else MXFP4_GROUP
    if scheme.bits != 4 or scheme.group_size not in (0, size):
        raise ModelError(
            f"{stored.folder}: {parts['packed']} is U8 beside {scheme.bits}-bit groups of {scheme.group_size}, but of "
            f"such weights only {size} 4-bit floats to a scale are read; start from the original, unquantized model."
        )
    stored.check_shape(parts["scale"], [(n, ceil(2 * packed / size))])
    if nvidia:
        parts["global_scale"] = f"{weight}_global_scale"
        stored.part(parts["global_scale"], FLOAT_SCALES, weight)
        stored.check_shape(parts["global_scale"], [(1,), (), (1, 1)])
    return Packed(weight, (n, 2 * packed), parts, "nvfp4" if nvidia else "mxfp4", partial(_decode_fp4, size))


def _decode_fp4(size: int, parts: Parts) -> torch.Tensor:
    """Return values times the scale of their group; see Packed."""
    scales = to_float(parts["scale"])
    if "global_scale" in parts:
        scales = scales / parts["global_scale"].float()
    return fp4(parts["packed"], scales, size)
