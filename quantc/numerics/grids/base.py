"""What a grid computes: parameters for a weight, the nearest codes, their values, and the tensors it stores.

A grid is told which weights share parameters. Which weights are left out, and what wraps the product, it never learns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from ...spec import Grid, Groups, packed_bytes
from ..groups import spread_groups
from ..packing import pack_bits, unpack_bits
from ..parts import Part, Parts
from .columns import Columns
from .parameters import Parameters

CODES = "qweight"


class Arithmetic(ABC):
    """The arithmetic of one grid; a subclass in a file of its own for each, made known by `register`.

    Weights have shapes (N, K), codes and values (..., N, K) with leading dimensions for experts.
    """

    def __init__(self, grid: Grid):
        self.grid = grid

    @abstractmethod
    def fit(self, weight: torch.Tensor, groups: Groups, importance: torch.Tensor | None = None) -> Parameters:
        """Return the parameters of least squared rounding error for weight (N, K), searched as they will be stored.

        importance: float (K,), weights of the squared error per input channel (a Gram diagonal), or None.
        """

    @abstractmethod
    def nearest(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        """Return codes uint8 (N, K), the nearest one for every weight."""

    @abstractmethod
    def columns(self, parameters: Parameters, groups: Groups, shape: tuple[int, int], order: Sequence[int]) -> Columns:
        """Return the grid laid out for a sweep that visits the columns of a weight (N, K) in an order."""

    def settle(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> Parameters:
        """Return what the parameters become once codes (N, K) are final."""
        return parameters

    def wanted_scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return magnitudes of the scales that cover ranges from low to high, if scales had no limits of their own."""
        raise NotImplementedError

    def width_matters(self, parameters: Parameters) -> bool:
        """Return whether a code of the grid of one bit more may have another value under the same parameters."""
        return True

    # Values are steps times the scale of a group, and what minima add, or a grid has a `value` of its own.

    def value(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        """Return float32 W (..., N, K), the values of codes: the reference that every kernel is checked against."""
        scales = spread_groups(parameters.scales.float(), groups, (codes.shape[-2], codes.shape[-1]))
        return self.steps_(codes.float().contiguous(), parameters, groups).mul_(scales)

    def steps_(self, codes: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        """Convert contiguous float32 codes (..., N, K) into what scales multiply, in place."""
        raise NotImplementedError

    def bases(self, parameters: Parameters, groups: Groups, shape: tuple[int, int]) -> torch.Tensor | None:
        """Return what minima add to scaled steps, float32 (..., N, K); None for grids without minima."""
        return None

    def strides_(self, values: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        """Multiply contiguous float32 values (..., N, K) in place by the steps from each code to the next."""
        return values

    def positions(self, weight: torch.Tensor, parameters: Parameters, groups: Groups) -> torch.Tensor:
        """Return where float32 weights (..., N, K) are among the codes, float32: 2.5 is between codes 2 and 3."""
        shape = (weight.shape[-2], weight.shape[-1])
        scales = spread_groups(parameters.scales.float(), groups, shape)
        return (weight / scales).add_(self.zero_points(parameters, groups, shape))

    # For grids that hold 0.

    def zero_points(self, parameters: Parameters, groups: Groups, shape: tuple[int, int]) -> torch.Tensor:
        """Return the codes of 0, float32 (..., N, K), or as broadcasts to it."""
        raise NotImplementedError

    def idle(self, size: Sequence[int], device: torch.device) -> Parameters:
        """Return the parameters of groups that are dropped."""
        return Parameters(torch.ones(tuple(size), dtype=torch.float16, device=device))

    # The stored form. Formats say how many rows of codes and of groups there are.

    def layout_codes(self, size: Sequence[int]) -> dict[str, Part]:
        """Return the parts of codes (..., K)."""
        return {CODES: Part(torch.uint8, (*size[:-1], packed_bytes(size[-1], self.grid.bits)))}

    def pack_codes(self, codes: torch.Tensor) -> Parts:
        """Return the stored codes, as `layout_codes` says."""
        return {CODES: pack_bits(codes, self.grid.bits)}

    def unpack_codes(self, parts: Parts, size: tuple[int, int]) -> torch.Tensor:
        """Return codes (..., R, K) for R, K = size, exactly those that were packed."""
        return unpack_bits(parts[CODES], self.grid.bits, size[1])

    def layout_parameters(self, size: Sequence[int]) -> dict[str, Part]:
        """Return the parts of the parameters of groups (..., G)."""
        return {"scales": Part(torch.float16, tuple(size))}

    def pack_parameters(self, parameters: Parameters) -> Parts:
        """Return the stored parameters, as `layout_parameters` says."""
        return {"scales": parameters.scales}

    def unpack_parameters(self, parts: Parts, count: int) -> Parameters:
        """Return the parameters of groups (..., G) for G = count, exactly those that were packed."""
        return Parameters(parts["scales"])


ARITHMETIC: dict[str, type[Arithmetic]] = {}


def register(name: str) -> Callable[[type[Arithmetic]], type[Arithmetic]]:
    """Return a class decorator that makes arithmetic known under the name of its grid."""

    def known(kind: type[Arithmetic]) -> type[Arithmetic]:
        ARITHMETIC[name] = kind
        return kind

    return known


def arithmetic_of(grid: Grid) -> Arithmetic:
    """Return what computes a grid."""
    return ARITHMETIC[grid.name](grid)
