"""Low-rank compensation in closed form: the b a that takes most of a rounding error E = W - W' away.

For inputs with Gram matrix G = S S^T the loss is tr((E - b a) G (E - b a)^T) = |E S - b a S|^2, least where b a S is
the truncated SVD of E S, as LQER does with a diagonal S (arXiv:2402.02446) and EoRA in the eigenspace of G
(arXiv:2410.21271). With U the leading left singular vectors of E S that is b = U and a = U^T E: the singular part
U U^T E S without an inverse of S, so a singular G needs no cut-off. Since U U^T is a projection, no input, seen or
not, has a larger error after it than before. A pseudo-inverse cut off at float32 roundoff, which gives a nothing to
do for unseen inputs, left a fifth more error on held-out text after 20 calibration texts and up to half more after
one (tests/tiny_model, 3 bits, rank 8). Singular values below 1e-6 of the largest are lost: their squares are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch

OVERSAMPLE = 8  # rows of a Krylov block beyond the rank: at rank 16 a block gets 3.5 x closer, without them 2.4 x
FEWEST_BLOCKS = 8  # the search takes 3 to 7; where fewer than this fit, all eigenvectors cost no more
GROWTH = 1e-3  # of the error that stays: the search ends when a further block gains less
ROUNDOFF = 1e-13  # of the largest value of the map: what float64 products leave of exact zeros, and more
BAND_WEIGHTS = 1 << 17  # weights converted to float64 at once: 1 MiB stays in a core's cache
LARGEST = 65504.0  # the largest float16

Map = Callable[[torch.Tensor], torch.Tensor]


class GramRoot:
    """A Gram matrix and its root, for all weights that read one activation.

    gram: float32 (K, K), symmetric; what rounding made negative of its eigenvalues counts as 0. The
    eigendecomposition takes 0.04 s of a core at K = 576 and 0.6 s at 1536; it is made when a weight first needs it
    and kept. Raises ArithmeticError for NaN or infinity.
    """

    def __init__(self, gram: torch.Tensor):
        if not _finite(gram):
            raise ArithmeticError(f"the Gram matrix of {len(gram)} inputs is not finite")
        self.gram = gram

    @cached_property
    def mean(self) -> float:
        """The mean energy of the inputs that were not always zero."""
        diagonal = self.gram.diagonal().double()
        live = diagonal[diagonal > 0]
        return float(live.mean()) if len(live) else 0.0

    @cached_property
    def eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues, at least 0, float64 (K,), and eigenvectors as columns (K, K)."""
        values, vectors = torch.linalg.eigh(self.gram.double())
        return values.clamp_(min=0), vectors

    def root(self, added: float = 0.0) -> torch.Tensor:
        """Return float64 S (K, K) with S S^T = G + added I."""
        values, vectors = self.eigen
        return vectors * (values + added).sqrt()


def compensate(
    residual: torch.Tensor, gram: torch.Tensor | GramRoot | None, rank: int, damp: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float16 a (R, K) and b (N, R) that minimise tr((E - b a) G (E - b a)^T) for E = residual (N, K).

    gram: G (K, K), or its GramRoot where several weights share it, or None for the identity. damp: share of the mean
    Gram diagonal added to G when the directions are chosen; on held-out text (tests/tiny_model) 0.001 changed little
    and 0.1 left a quarter more error, or worse.

    Components come in falling order; from where rounding to float16 costs more than they gain they are 0, so that the
    error never rises. The same input gives the same output, whatever the state of torch's generators.
    Raises ValueError for a rank outside 0 to min(N, K), ArithmeticError for NaN or infinity.
    """
    n, k = residual.shape
    if not 0 <= rank <= min(n, k):
        raise ValueError(f"a weight of {n} x {k} has ranks 0 to {min(n, k)}, not {rank}")
    if not _finite(residual):
        raise ArithmeticError(f"the residual of a weight of {n} x {k} is not finite")
    root = GramRoot(gram) if isinstance(gram, torch.Tensor) else gram
    left = _leading(residual, root, damp * root.mean if root else 0.0, rank)
    a, b = _to_float16(left, _times(left, residual))
    kept = _worth_keeping(residual, root, a, b)
    a[kept:] = 0
    b[:, kept:] = 0
    return a, b


def _leading(residual: torch.Tensor, root: GramRoot | None, added: float, rank: int) -> torch.Tensor:
    """Return float64 (R, N): orthonormal leading eigenvectors of E (G + added I) E^T, as rows, the largest first."""
    n, k = residual.shape
    width = rank + OVERSAMPLE
    if FEWEST_BLOCKS * width >= min(n, k):
        return _leading_of_all(residual, root, added, rank)

    def product(rows: torch.Tensor) -> torch.Tensor:
        return _times_transposed(_weighed(_times(rows, residual), root, added), residual)

    return _krylov(product, _start(width, n, residual.device), rank)


def _leading_of_all(residual: torch.Tensor, root: GramRoot | None, added: float, rank: int) -> torch.Tensor:
    """Return `_leading` by the eigendecomposition of the smaller of E (G + added I) E^T and S^T E^T E S."""
    error = residual.double()
    if error.shape[0] <= error.shape[1]:
        vectors = torch.linalg.eigh(_weighed(error, root, added) @ error.T)[1]
        return vectors[:, error.shape[0] - rank :].flip(1).T
    seen = error if root is None else error @ root.root(added)
    vectors = torch.linalg.eigh(seen.T @ seen)[1][:, error.shape[1] - rank :]
    # Orthonormal from the first on, and even where singular values are 0.
    return torch.linalg.qr(seen @ vectors.flip(1))[0].T


def _krylov(product: Map, start: torch.Tensor, rank: int) -> torch.Tensor:
    """Return float64 (R, N): leading eigenvectors of a symmetric PSD map of rows (., N); rows of 0 past the map's rank.

    Rayleigh-Ritz over a block Krylov space (Musco and Musco 2015, arXiv:1504.05477). The spectrum of a rounding error
    is flat but for a few directions: there the space finds the energy, and which of near-equal directions hold it
    does not matter. start: (width, N), width at least rank.
    """
    basis = start.new_empty(0, start.shape[1])
    images, taken, best = basis, 0.0, basis
    block = _orthonormal(product(start), basis)
    while len(block):
        image = product(block)
        basis, images = torch.cat([basis, block]), torch.cat([images, image])
        inner = images @ basis.T
        values, mix = torch.linalg.eigh((inner + inner.T) / 2)
        others = max(len(values) - rank, 0)
        best = mix[:, others:].flip(1).T @ basis
        stays = float(values[:others].sum())  # at least: energy outside the space comes on top
        before, taken = taken, float(values.sum()) - stays
        if taken - before <= GROWTH * stays:
            break
        block = _orthonormal(image, basis)
    return torch.cat([best, best.new_zeros(rank - len(best), best.shape[1])])


def _orthonormal(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return orthonormal rows for what rows (R, N) add to the span of the basis; fewer than R where they add less.

    Done twice, since subtracting once leaves roundoff. A row that the second time shortens again was only that.
    """
    floor = ROUNDOFF * float(rows.norm(dim=1).max())
    for _ in range(2):
        factor, lengths = torch.linalg.qr((rows - (rows @ basis.T) @ basis).T)
        rows = factor.T[lengths.diagonal().abs() > floor]
        floor = 0.5
    return rows


def _start(count: int, width: int, device: torch.device) -> torch.Tensor:
    """Return float64 (count, width), rows without structure from a formula: results must not depend on a seed.

    Row j is cos(2 pi i^2 j phi) over i = 1 .. width, with phi the golden ratio: quadratic Weyl sequences.
    """
    i = torch.arange(1, width + 1, dtype=torch.float64, device=device)
    j = torch.arange(1, count + 1, dtype=torch.float64, device=device)
    turns = torch.outer(j * (0.5 * 5**0.5 - 0.5), i * i)
    return torch.cos(2 * torch.pi * (turns % 1))


def _to_float16(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a (R, K) and b (N, R) with b a = left^T right: left is (R, N), right (R, K).

    A component's largest entries in a and b are made equal, which keeps both as far as possible from either end of
    float16. A component too large for that even so is scaled down and takes only a part of the error away.
    """
    tops = left.abs().amax(1, keepdim=True), right.abs().amax(1, keepdim=True)
    peak = (tops[0] * tops[1]).sqrt().clamp(max=LARGEST)
    b, a = (rows * (peak / top.clamp(min=1e-300)) for rows, top in zip((left, right), tops, strict=True))
    return a.half(), b.T.half().contiguous()


def _worth_keeping(residual: torch.Tensor, root: GramRoot | None, a: torch.Tensor, b: torch.Tensor) -> int:
    """Return how many of the first components of the rounded a and b take most error away; 0 where none do.

    They take 2 tr(a G E^T b) - tr((b^T b) (a G a^T)) away: sums over components and over pairs of them.
    """
    if not len(a):
        return 0
    rows, columns = a.double(), b.T.double()
    seen = _weighed(rows, root, 0.0)
    single = 2 * (_times_transposed(seen, residual) * columns).sum(1).cumsum(0)
    pairs = ((columns @ columns.T) * (seen @ rows.T)).cumsum(0).cumsum(1).diagonal()
    gains = single - pairs
    best = int(gains.argmax())
    return best + 1 if float(gains[best]) > 0 else 0


def _weighed(rows: torch.Tensor, root: GramRoot | None, added: float) -> torch.Tensor:
    """Return float64 rows (R, K) times G + added I."""
    if root is None:
        return rows
    weighed = _times(rows, root.gram)
    return weighed.add_(rows, alpha=added) if added else weighed


def _times(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return float64 rows (R, N) times matrix (N, K), converted to float64 in bands."""
    total = rows.new_zeros(len(rows), matrix.shape[1])
    height = _band_of(matrix)
    for part, band in zip(rows.split(height, 1), matrix.split(height), strict=True):
        total.addmm_(part, band.double())
    return total


def _times_transposed(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return float64 rows (R, K) times the transpose of matrix (N, K), converted to float64 in bands."""
    return torch.cat([rows @ band.double().T for band in matrix.split(_band_of(matrix))], 1)


def _band_of(matrix: torch.Tensor) -> int:
    return max(1, BAND_WEIGHTS // matrix.shape[1])


def _finite(matrix: torch.Tensor) -> bool:
    """Return whether all values are finite, in one pass without temporaries: minimum and maximum carry NaN out."""
    low, high = torch.aminmax(matrix)
    return bool(torch.isfinite(low) & torch.isfinite(high))
