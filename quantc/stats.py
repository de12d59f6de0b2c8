"""What calibration accumulates per activation. Accumulators of parts of the data merge into one."""

from __future__ import annotations

import torch


class Gram:
    """G = X^T X over calibration rows X (M, K), in float32, and M."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.matrix = torch.zeros(width, width, device=device)
        self.rows = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (M, K)."""
        rows = rows.float()
        self.matrix.addmm_(rows.T, rows)
        self.rows += rows.shape[0]

    def merge(self, other: Gram) -> None:
        self.matrix += other.matrix
        self.rows += other.rows

    @staticmethod
    def bytes_for(width: int) -> int:
        return width * width * 4


def output_energy(weight: torch.Tensor, gram: torch.Tensor | None) -> float:
    """tr(W G W^T): the summed square of x W^T over the calibration rows; G is the identity when gram is None."""
    weight = weight.float()
    product = weight if gram is None else weight @ gram
    return float((product * weight).sum(dtype=torch.float64))
