"""AutoRound folders: GPTQ's or AWQ's tensors, with settings of their own for some layers.

Read in auto-round 0.16: inference/convert_model.py, inference/backend.py and utils/bit_packing.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from .awq import awq_tensors
from .base import Container, Packed, register
from .gptq import gptq_tensors
from .rules import Overrides, compiled
from .settings import Settings
from .stored import Stored

ZERO_POINTS_LESS = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:gptqmodel": 0}
AWQ = "auto_round:auto_awq"
FLOAT_BITS = 16


@register
class AutoRound(Container):
    """`packing_format` says whose tensors they are; `extra_config` has the layers that differ."""

    methods = ("auto-round", "intel/auto-round")

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._format = str(settings.get("packing_format", str, "auto_round:auto_gptq"))
        kind = settings.get("data_type", str, "int")
        if self._format not in (*ZERO_POINTS_LESS, AWQ) or kind != "int":
            raise settings.unread(f"auto-round's packing_format {self._format} (data_type {kind})")
        self.rounds_activations = settings.get("act_bits", int, FLOAT_BITS) < FLOAT_BITS
        self._rules = Overrides(settings, _extra(settings))

    def packed(self, stored: Stored) -> Iterator[Packed]:
        if self._format == AWQ:
            return awq_tensors(stored, self._rules)
        return gptq_tensors(stored, self._rules, ZERO_POINTS_LESS[self._format])


def _extra(settings: Settings) -> Iterator[tuple[Callable[[str], object], Settings | None]]:
    """Yield the rules of `extra_config`: names of layers first, then the same as expressions found anywhere in one."""
    inside = settings.inside("extra_config")
    rules = list(inside.each()) if inside else []
    for key, changes in rules:
        yield key.__eq__, changes
    for key, changes in rules:
        if changes.content and re.escape(key) != key.replace(".", r"\."):
            yield compiled(key, settings).search, changes
