"""AWQ folders of version gemm: codes and zero points along the outputs of a layer, in an order of their own.

Read in AutoAWQ: awq/modules/linear/gemm.py and awq/utils/packing_utils.py, and for other widths than 4 in auto-round
0.16: utils/bit_packing.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil

import torch

from .base import Container, Packed, Parts, register
from .codes import affine, unpack_awq, word_counts
from .rules import Overrides
from .settings import Settings
from .stored import Stored

TOGETHER = 8  # codes in that order


@register
class Awq(Container):
    """`version` gemm; older folders call bits w_bit and group_size q_group_size."""

    methods = ("awq",)

    def __init__(self, settings: Settings):
        old = {"w_bit": "bits", "q_group_size": "group_size"}
        content = {old.get(key, key): value for key, value in settings.content.items()}
        super().__init__(Settings(settings.folder, content, settings.place))
        version = str(self.settings.get("version", str, "gemm"))
        if version.lower() != "gemm":
            raise settings.unread(f"awq's version {version}")

    def packed(self, stored: Stored) -> Iterator[Packed]:
        return awq_tensors(stored, Overrides(self.settings, ()))


def awq_tensors(stored: Stored, rules: Overrides) -> Iterator[Packed]:
    """Yield the weights of every `qweight`."""
    for module in stored.modules("qweight"):
        settings = rules.of(stored.names_of(module))
        yield _weight(stored, module, settings.bits(), settings.group_size())


def _weight(stored: Stored, module: str, bits: int, group_size: int) -> Packed:
    weight = f"{module}.weight"
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    k, words = stored.part(parts["qweight"], ("I32",), weight).shape
    groups = ceil(k / group_size) if group_size else 1
    stored.part(parts["qzeros"], ("I32",), weight)
    n = stored.part(parts["scales"], ("F16", "BF16", "F32"), weight).shape[-1]
    stored.check_shape(parts["qzeros"], [(groups, words)])
    stored.check_shape(parts["scales"], [(groups, n - n % TOGETHER)])
    stored.check_shape(parts["qweight"], [(k, word_counts(n, bits)[0])])
    label = f"int{bits} g{group_size}" if group_size else f"int{bits}"
    return Packed(weight, (n, k), parts, label, partial(_decode, n, bits, group_size))


def _decode(n: int, bits: int, group_size: int, parts: Parts) -> torch.Tensor:
    """Return (codes - zeros) * scales; see Packed."""
    codes, zeros = (unpack_awq(parts[part], bits, n).T for part in ("qweight", "qzeros"))
    return affine(codes, zeros, parts["scales"].T, group_size, None).contiguous()
