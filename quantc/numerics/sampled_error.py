"""What rounding a weight would lose, tried on a sample of its output channels: how passes compare ways to store it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..spec import QuantSpec
from .basis import FEWEST_ROWS_SHARE, Basis
from .statistics import Gram, channel_energies


def lost_energies(sample: torch.Tensor, basis: Basis, spec: QuantSpec, rounds: int = 0) -> torch.Tensor:
    """Return float64 (M,), the energy each channel of x W^T loses, for rotated weights (M, K) rounded as the spec says.

    A sample has none of the rows that have one bit more.
    """
    tensor = basis.round(sample, replace(spec, wide_rows=0), rounds)
    return channel_energies(tensor.dequantize() - sample, basis.gram)


def lost_energy(weight: torch.Tensor, basis: Basis, spec: QuantSpec, least: int) -> float:
    """Return tr(D G D^T) of a weight (N, K), rotated and rounded, estimated on at least `least` output channels."""
    n, k = weight.shape
    rows = sample_rows(n, spec.rows_together((n, k)), least)
    lost = lost_energies(basis.turn(weight[rows.to(weight.device)]), basis, spec)
    return float(lost.sum()) * n / len(rows)


def output_change(weight: torch.Tensor, basis: Basis, spec: QuantSpec, gram: torch.Tensor, least: int) -> float:
    """Return tr(D G D^T) for the change D of a weight (N, K) that multiplies unrotated inputs with Gram matrix (K, K).

    Estimated on `least` output channels or more, like `lost_energy`, but comparable between bases.
    """
    n, k = weight.shape
    rows = sample_rows(n, spec.rows_together((n, k)), least)
    sample = weight[rows.to(weight.device)]
    tensor = basis.round(basis.turn(sample), replace(spec, wide_rows=0, hadamard=basis.block))
    return float(channel_energies(tensor.effective_weight() - sample, gram).sum()) * n / len(rows)


def sample_rows(n: int, g: int, least: int) -> torch.Tensor:
    """Return int64 (M,), M >= least: output channels of whole groups of g, spread over n; all where there are few."""
    whole, wanted = n // g, -(-least // g)
    if whole <= wanted:
        return torch.arange(n)
    first = torch.arange(wanted) * whole // wanted * g
    return (first[:, None] + torch.arange(g)).reshape(-1)


def guides(gram: Gram) -> bool:
    """Return whether a Gram matrix has seen enough rows for error feedback."""
    return gram.rows >= gram.width * FEWEST_ROWS_SHARE
