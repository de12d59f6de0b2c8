"""What calibration accumulates per activation. Accumulators of parts of the data merge into one."""

from __future__ import annotations

from typing import Protocol

import torch

BAD_ROWS_LIMIT = 0.1  # share of non-finite calibration rows past which a run stops
BAND = 128  # columns a Gram update handles at once: below the diagonal nothing is computed, 1.7 x faster


class AddProducts(Protocol):
    """Another way to add rows^T rows, for rows (M, K) float32, to upper (K, K) float32 on and above the diagonal.

    False, with nothing done, where it does not take such rows. Below the diagonal it may write anything.
    """

    def __call__(self, rows: torch.Tensor, upper: torch.Tensor) -> bool: ...


class Gram:
    """G = X^T X over calibration rows X (M, K), in float32, and M = `rows`; `bad_rows` were left out.

    add_products: made for the device, asked first to add rows; None adds them by torch.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", add_products: AddProducts | None = None):
        self.width, self.rows, self.bad_rows = width, 0, 0
        self._add_products = add_products
        self._upper = torch.zeros(width, width, device=device)

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add rows (M, K), each counted as often as weights (M,) say; rows with NaN or infinity are left out."""
        rows = rows.float()
        if weights is not None:
            rows = rows * weights.to(rows).sqrt()[:, None]
        if rows.numel() and not all_finite(rows):
            finite = torch.isfinite(rows).all(1)
            self.bad_rows += int((~finite).sum())
            rows = rows[finite]
        if self._add_products is None or not self._add_products(rows, self._upper):
            _add_by_bands(rows, self._upper)
        self.rows += rows.shape[0]

    def divide_rows(self, scales: torch.Tensor) -> None:
        """Change the matrix as if every row had been divided by scales (K,)."""
        inverse = (1 / scales.double()).to(self._upper)
        self._upper.mul_(inverse[:, None]).mul_(inverse)

    @property
    def matrix(self) -> torch.Tensor:
        """The Gram matrix, float32 (K, K), symmetric."""
        full = self._upper.triu()
        for start in range(0, self.width, BAND):  # in bands, so that no second matrix is held
            band = slice(start, start + BAND)
            full[start + BAND :, band] = full[band, start + BAND :].T
            full[band, band] += full[band, band].triu(1).T
        return full

    @staticmethod
    def bytes_for(width: int) -> int:
        return width * width * 4


def _add_by_bands(rows: torch.Tensor, upper: torch.Tensor) -> None:
    for start in range(0, rows.shape[1], BAND):
        band = rows[:, start : start + BAND]
        upper[start : start + BAND, start:].addmm_(band.T, rows[:, start:])


class Drift:
    """D = (X0 - X)^T X over calibration rows X (M, K) and what each of them was, X0, before weights were rounded.

    Differences are summed, not X0^T X: where nothing has drifted, D is exactly zero.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self._sum = torch.zeros(width, width, device=device)

    def add_all(self, originals: list[torch.Tensor], parts: list[torch.Tensor], weights: torch.Tensor | None) -> bool:
        """Add rows, each counted as often as weights (M,) say; False, with nothing added, where they do not pair.

        A row that is not finite on either side adds nothing.
        """
        if [rows.shape for rows in originals] != [rows.shape for rows in parts]:
            return False
        for original, rows in zip(originals, parts, strict=True):
            difference = original.float() - rows.float()
            finite = torch.isfinite(difference).all(1)
            if weights is not None:
                difference = difference * weights.to(difference)[:, None]
            self._sum.addmm_(difference[finite].T, rows[finite].float())
        return True

    def correction(self, gram: torch.Tensor, damp: float) -> torch.Tensor:
        """Return float32 A (K, K) with X0 W^T nearest to X (W + W A)^T, for G = X^T X (K, K) and any W (N, K).

        damp: share of the mean diagonal of G that is added to it. Least squares: A = D (G + damp)^-1; zero where that
        is not positive definite.
        """
        damped = gram.double()
        diagonal = damped.diagonal()
        diagonal.add_(damp * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped, diagonal
        if int(failed):
            return torch.zeros_like(gram)
        bands = self._sum.split(BAND)  # no second matrix in float64
        return torch.cat([torch.cholesky_solve(band.double().T, lower).T.float() for band in bands])


def output_energy(weight: torch.Tensor, gram: torch.Tensor | None) -> float:
    """Return tr(W G W^T), the summed square of x W^T over the calibration rows; G is the identity when gram is None."""
    return float(channel_energies(weight, gram).sum())


def channel_energies(weight: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """Return float64 (N,), the summed square of each channel of x W^T; G is the identity when gram is None."""
    weight = weight.float()
    product = weight if gram is None else weight @ gram
    return (product * weight).sum(1, dtype=torch.float64)


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values are finite, in one pass without temporaries: minimum and maximum carry NaN out."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
