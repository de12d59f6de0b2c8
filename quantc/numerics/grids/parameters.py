"""Parameters: what a grid keeps for the groups of a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

MINIMA = "minima"


@dataclass
class Parameters:
    """One value of each tensor for a group, or for a group of groups where scales have scales of their own.

    scales: float16, shaped as groups.counts; more exact during a sweep. zeros: uint8 like scales, or None for grids
    without. more: by name, what else a grid keeps, such as sub-scales; its
    minima are float16 like scales, and a multiple of each is taken off the weights of its group.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    more: dict[str, torch.Tensor] = field(default_factory=dict)

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Parameters:
        """Return the parameters with every tensor changed."""
        return Parameters.merged([self], lambda tensors: change(tensors[0]))

    @staticmethod
    def merged(each: Sequence[Parameters], merge: Callable[[Sequence[torch.Tensor]], torch.Tensor]) -> Parameters:
        """Return parameters whose tensors are each made of those that all of several weights have."""
        zeros = [parameters.zeros for parameters in each if parameters.zeros is not None]
        return Parameters(
            merge([parameters.scales for parameters in each]),
            merge(zeros) if len(zeros) == len(each) else None,
            {name: merge([parameters.more[name] for parameters in each]) for name in each[0].more},
        )
