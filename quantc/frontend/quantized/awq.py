"""AWQ folders of version gemm: 4-bit codes and zero points along the outputs of a layer, in an order of their own.

Read in AutoAWQ: awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil

import torch

from .base import Container, Packed, Parts, register
from .codes import affine, unpack_awq
from .rules import Overrides
from .settings import Settings
from .stored import Stored

CODES = 8  # in a word


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
        if settings.bits() != 4:
            raise settings.wrong("bits", "4, as in all AWQ folders,")
        yield _weight(stored, module, settings.group_size())


def _weight(stored: Stored, module: str, group_size: int) -> Packed:
    weight = f"{module}.weight"
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales")}
    k, words = stored.part(parts["qweight"], ("I32",), weight).shape
    groups = ceil(k / group_size) if group_size else 1
    stored.part(parts["qzeros"], ("I32",), weight)
    stored.part(parts["scales"], ("F16", "BF16", "F32"), weight)
    stored.check_shape(parts["qzeros"], [(groups, words)])
    stored.check_shape(parts["scales"], [(groups, CODES * words)])
    label = f"int4 g{group_size}" if group_size else "int4"
    return Packed(weight, (CODES * words, k), parts, label, partial(_decode, group_size))


def _decode(group_size: int, parts: Parts) -> torch.Tensor:
    """Return (codes - zeros) * scales; see Packed."""
    codes, zeros = unpack_awq(parts["qweight"]).T, unpack_awq(parts["qzeros"]).T
    return affine(codes, zeros, parts["scales"].T, group_size, None).contiguous()
