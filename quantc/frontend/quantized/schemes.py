"""The config groups of compressed-tensors: which scheme each module is stored in.

Read in compressed-tensors 0.20: quantization/quant_config.py, quant_args.py and utils/match.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ModelError
from .rules import EXPRESSION, name_matcher
from .settings import Settings
from .stored import Stored

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group are stored. block: sides of what shares a scale, 0 for a whole side."""

    bits: int
    symmetric: bool
    block: tuple[int, int]

    @property
    def group_size(self) -> int:
        """The columns of a group, 0 for whole rows."""
        return self.block[1]


class Schemes:
    """The groups by their targets. rounds_activations: whether one of them says so."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._targets: dict[str, Scheme] = {}
        self.rounds_activations = False
        groups = settings.inside("config_groups")
        for _, group in groups.each() if groups else ():
            activations = [group.get(key, dict) for key in ("input_activations", "output_activations")]
            self.rounds_activations |= any(activations)
            weights = group.inside("weights")
            if weights is not None:
                self._targets.update(dict.fromkeys(group.need("targets", list[str]), _scheme(weights)))
        # As its own reader orders them: names, then expressions; a class counts where neither matches.
        names = sorted(self._targets, key=lambda target: (target.startswith(EXPRESSION), target))
        self._matching = [(target, name_matcher(target, settings)) for target in names]

    def of(self, stored: Stored, module: str) -> Scheme:
        """Return the scheme of a module that is stored packed; raises ModelError where no group has it.

        `ignore` needs no reading: what it names is stored in floats.
        """
        for target, matches in self._matching:
            if any(matches(name) for name in stored.names_of(module)):
                return self._targets[target]
        kind = stored.kind_of(module)
        if kind in self._targets:
            return self._targets[kind]
        raise ModelError(
            f"{stored.folder}: {module} is stored packed, but no config group of {self._settings.place} has it among "
            "its targets; use the config that belongs to the weights."
        )


def _scheme(weights: Settings) -> Scheme:
    strategy = str(weights.get("strategy", str, "")).lower()
    size = weights.group_size()
    strategy = strategy or ("group" if size else "tensor")
    if strategy not in STRATEGIES:
        raise weights.wrong("strategy", " or ".join(STRATEGIES))
    blocks = {"tensor": (0, 0), "channel": (1, 0), "block": (0, 0)}
    block = blocks.get(strategy, (1, size))
    if strategy == "block":
        rows, columns = weights.need("block_structure", tuple[int, int])
        if min(rows, columns) < 1:
            raise weights.wrong("block_structure", "a list of two sizes of at least 1")
        block = (rows, columns)
    return Scheme(weights.bits("num_bits"), weights.get("symmetric", bool, True), block)
