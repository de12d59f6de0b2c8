"""Which weights to drop, in whole groups or two of four, and what those that stay should then be, before rounding.

With D = W' - W what counts is f = tr(D H D^T), H (K, K) the Gram matrix of the inputs, damped so that it is definite.
`by_admm` looks for them by the alternating direction method of multipliers, as ALPS does for single weights
(Meng et al. 2024, arXiv:2406.07831): here groups compete over the whole
matrix. `fit_support` then minimises f over all
that stays.

Relative f on 7 linears of SmolLM2-135M (block 10), half of the groups of 16 dropped, the rest in 4 bits by `gptq`:
groups of least magnitude times activation (Wanda) 0.081, of least energy w H w^T 0.079, by ADMM 0.071; without
`fit_support` before rounding 0.110, 0.104 and 0.095. By ADMM it was least for each of the 7 before rounding, so nothing
else is tried where there is an H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import QuantSpec
from .groups import spread_groups

PENALTY = 0.1  # first of ADMM, for an H of unit diagonal
ADMM_STEPS = 10  # 30 lose as much
# What the penalty is multiplied by in a step: more where a larger share of the weights still changes.
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
        """Decompose H (K, K) with a positive diagonal in float64; the result is float32."""
        lengths = gram.diagonal().double().sqrt()
        values, vectors = torch.linalg.eigh(gram / lengths / lengths[:, None])
        return cls(gram, lengths.float(), values.clamp(min=0).float(), vectors.float())


def by_magnitude(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return bool (N, K), the weights that stay when those of least squares drop in the spec's pattern."""
    return _two_of_four(weight) if spec.pattern.drops == "weights" else _largest_groups(weight, spec)


def _two_of_four(weight: torch.Tensor) -> torch.Tensor:
    squares = _padded_squares(weight, 4, -1.0)  # what is missing of the last four never takes a weight's place
    kept = torch.zeros_like(squares, dtype=torch.bool).scatter_(2, squares.topk(2, dim=2).indices, True)
    return kept.view(len(weight), -1)[:, : weight.shape[1]]


def _largest_groups(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    shape = (weight.shape[0], weight.shape[1])
    squares = _padded_squares(weight, spec.group_length(shape), 0.0)
    groups = torch.zeros(squares.shape[0] * squares.shape[1], dtype=torch.bool, device=weight.device)
    groups[squares.sum(2).flatten().topk(spec.kept_groups(shape)).indices] = True
    return spread_groups(groups.view(squares.shape[:2]), spec.groups, shape)


def _padded_squares(weight: torch.Tensor, g: int, filler: float) -> torch.Tensor:
    """Return squares (N, ceil(K/g), g) of weight (N, K)."""
    squares = torch.nn.functional.pad(weight.float().square(), (0, -weight.shape[1] % g), value=filler)
    return squares.view(len(weight), -1, g)


def by_admm(weight: torch.Tensor, spectrum: Spectrum, spec: QuantSpec) -> torch.Tensor:
    """Return bool (N, K), the weights to keep, in the spec's pattern, to come nearest to the outputs."""
    wanted = weight.float() * spectrum.lengths
    pulls = wanted @ (spectrum.vectors * spectrum.values)  # W H, in the basis of the eigenvectors
    sparse, multiplier = wanted, torch.zeros_like(wanted)
    penalty, kept = PENALTY, by_magnitude(wanted, spec)
    for _ in range(ADMM_STEPS):
        turned = torch.addmm(pulls, sparse - multiplier, spectrum.vectors, alpha=penalty)
        multiplier += turned.div_(spectrum.values + penalty) @ spectrum.vectors.T
        before, kept = kept, by_magnitude(multiplier, spec)
        sparse = multiplier * kept
        multiplier -= sparse
        changed = float((kept != before).float().mean())
        penalty *= next(factor for share, factor in GROWTH if changed > share)
    return kept


def fit_support(weight: torch.Tensor, gram: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Return float32 (N, K), 0 where stays (N, K) is False, of least f for weight and H = gram.

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
