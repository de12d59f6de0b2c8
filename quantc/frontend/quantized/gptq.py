"""GPTQ folders, of AutoGPTQ and GPTQModel: codes along the inputs of a layer, zero points less one in version 1.

Read in gptqmodel 7: nn_modules/qlinear/__init__.py, utils/model.py and quantization/config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil

import torch

from .base import Container, Packed, Parts, register
from .codes import WORD, affine, unpack_words, word_counts
from .rules import Overrides, compiled
from .settings import Settings
from .stored import Stored

TRANSPOSED = "Conv1D"  # the class whose weight is stored (K, N)


@register
class Gptq(Container):
    """`checkpoint_format` gptq or gptq_v2, and `dynamic` for layers with settings of their own."""

    methods = ("gptq",)

    def __init__(self, settings: Settings):
        super().__init__(settings)
        form = str(settings.get("checkpoint_format", str) or settings.get("format", str, "gptq"))
        if form not in ("gptq", "gptq_v2"):
            raise settings.unread(f"gptq's checkpoint_format {form}")
        self._less = int(form == "gptq")
        self._rules = Overrides(settings, _dynamic(settings))

    def packed(self, stored: Stored) -> Iterator[Packed]:
        return gptq_tensors(stored, self._rules, self._less)


def _dynamic(settings: Settings) -> Iterator[tuple[Callable[[str], object], Settings | None]]:
    """Yield the rules of `dynamic`: "+:" or nothing before an expression changes settings, "-:" leaves a layer out."""
    rules = settings.inside("dynamic")
    for key, changes in rules.each() if rules else ():
        left_out = key.startswith("-:")
        matches = compiled(key[2:] if key.startswith(("-:", "+:")) else key, settings).match
        yield matches, None if left_out else changes


def gptq_tensors(stored: Stored, rules: Overrides, less: int) -> Iterator[Packed]:
    """Yield the weights of every `qweight`. less: by how much stored zero points are too small."""
    for module in stored.modules("qweight"):
        settings = rules.of(stored.names_of(module))
        yield _weight(stored, module, settings.bits(), settings.group_size(), less)


def _weight(stored: Stored, module: str, bits: int, group_size: int, less: int) -> Packed:
    weight = f"{module}.weight"
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    words, n = stored.part(parts["qweight"], ("I32",), weight).shape
    stored.part(parts["qzeros"], ("I32",), weight)
    stored.part(parts["scales"], ("F16", "BF16", "F32"), weight)
    k = words * WORD // bits
    if f"{module}.g_idx" in stored.headers:
        parts["g_idx"] = f"{module}.g_idx"
        k = stored.part(parts["g_idx"], ("I32", "I64"), weight).shape[0]
    groups = ceil(k / group_size) if group_size else 1
    if "g_idx" in parts:
        stored.check_g_idx(parts["g_idx"], groups)
    stored.check_shape(parts["qweight"], [(count, n) for count in word_counts(k, bits)])
    stored.check_shape(parts["scales"], [(groups, n)])
    stored.check_shape(parts["qzeros"], [(groups, count) for count in word_counts(n, bits)])
    transposed = stored.kind_of(module) == TRANSPOSED
    decode = partial(_decode, (n, k), bits, group_size, less, transposed)
    label = f"int{bits} g{group_size}" if group_size else f"int{bits}"
    return Packed(weight, (k, n) if transposed else (n, k), parts, label, decode)


def _decode(
    shape: tuple[int, int], bits: int, group_size: int, less: int, transposed: bool, parts: Parts
) -> torch.Tensor:
    """Return (codes - zeros) * scales of the group of each column; see Packed."""
    n, k = shape
    codes = unpack_words(parts["qweight"].T, bits, k)
    zeros = unpack_words(parts["qzeros"], bits, n).T.int() + less
    values = affine(codes, zeros, parts["scales"].T, group_size, parts.get("g_idx"))
    return values.T.contiguous() if transposed else values
