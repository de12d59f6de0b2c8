"""Which groups of a weight to drop, and what those that stay should then be. Nothing here knows of bits.

With D = W' - W what counts is f = tr(D H D^T), H (K, K) the Gram matrix of the inputs, damped so that it is definite.
`by_admm` looks for the groups by the alternating direction method of multipliers, as ALPS does for single weights
(Meng et al. 2024, arXiv:2406.07831): here groups compete over the whole weight. `fit_support` then minimises f over all
that stays.

Relative f on 7 linears of SmolLM2-135M (block 10), half of the groups of 16 dropped, the rest in 4 bits by `gptq`:
groups of least magnitude times activation (Wanda) 0.081, of least energy w H w^T 0.079, by ADMM 0.071; without
`fit_support` before rounding 0.110, 0.104 and 0.095. By ADMM it was least for each of the 7 before rounding, so nothing
else is tried where there is an H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PENALTY = 0.1  # first of ADMM, for an H of unit diagonal
ADMM_STEPS = 10  # 30 lose as much
# The penalty grows so much in a step, the faster the more groups (a share of them) still change.
GROWTH = ((0.02, 1.3), (0.005, 1.2), (-1.0, 1.1))
FIT_STEPS = 15  # 30 take 0.1 % off


@dataclass
class Spectrum:
    """H, scaled to a unit diagonal, by its eigenvectors.

    gram: float32 (K, K), H itself. lengths: (K,), the roots of its diagonal. values: (K,), vectors: (K, K), of the
    scaled matrix.
    """

    gram: torch.Tensor
    lengths: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor) -> Spectrum:
        """Of H (K, K) with a positive diagonal; decomposed in float64, kept in float32."""
        lengths = gram.diagonal().double().sqrt()
        values, vectors = torch.linalg.eigh(gram / lengths / lengths[:, None])
        return cls(gram, lengths.float(), values.clamp(min=0).float(), vectors.float())


def spread(kept: torch.Tensor, g: int, k: int) -> torch.Tensor:
    """bool (N, K) of marks for groups of g (N, G)."""
    return kept.repeat_interleave(g, 1)[:, :k]


def by_magnitude(weight: torch.Tensor, g: int, count: int) -> torch.Tensor:
    """bool (N, G): the `count` groups of g of a weight (N, K) with the largest sums of squares."""
    n, k = weight.shape
    columns = -(-k // g)
    energies = torch.nn.functional.pad(weight.float().square(), (0, columns * g - k)).view(n, columns, g).sum(2)
    kept = torch.zeros(n * columns, dtype=torch.bool, device=weight.device)
    kept[energies.flatten().topk(count).indices] = True
    return kept.view(n, columns)


def by_admm(weight: torch.Tensor, spectrum: Spectrum, g: int, count: int) -> torch.Tensor:
    """bool (N, G): the `count` groups of g with which a weight (N, K) can come nearest to its outputs."""
    wanted = weight.float() * spectrum.lengths
    pulls = wanted @ (spectrum.vectors * spectrum.values)  # W H, in the basis of the eigenvectors
    sparse, multiplier = wanted, torch.zeros_like(wanted)
    penalty, kept = PENALTY, by_magnitude(wanted, g, count)
    for _ in range(ADMM_STEPS):
        turned = torch.addmm(pulls, sparse - multiplier, spectrum.vectors, alpha=penalty)
        multiplier += turned.div_(spectrum.values + penalty) @ spectrum.vectors.T
        before, kept = kept, by_magnitude(multiplier, g, count)
        sparse = multiplier * spread(kept, g, weight.shape[1])
        multiplier -= sparse
        changed = float((kept != before).float().mean())
        penalty *= next(factor for share, factor in GROWTH if changed > share)
    return kept


def fit_support(weight: torch.Tensor, gram: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """float32 (N, K): of the weights that are 0 where stays (N, K) is not, those of least f for weight and H = gram.

    By conjugate gradients, for all rows at once, each preconditioned by the diagonal of H.
    """
    inverse, support = gram.diagonal().reciprocal(), stays.float()
    fitted = weight.float() * support
    left = (weight - fitted) @ gram * support
    way = left * inverse
    size = (left * way).sum(1, keepdim=True)
    for _ in range(FIT_STEPS):
        bent = way @ gram * support
        length = size / (way * bent).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        fitted.addcmul_(length, way)
        left.addcmul_(length, bent, value=-1)
        ahead, before = left * inverse, size
        size = (left * ahead).sum(1, keepdim=True)
        way = torch.addcmul(ahead, size / before.clamp(min=torch.finfo(torch.float32).tiny), way)
    return fitted
