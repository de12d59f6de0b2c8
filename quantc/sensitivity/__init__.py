"""What storing a linear in fewer bits would cost the model: a loss for every linear and every candidate.

Estimators answer the same question at different prices: `fisher` by gradients, `gram` by output errors alone, `kl` by
measuring. See benchmarks/notebook/budgets.md for how well each ranks and predicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ..pipeline.run import Run
from ..spec import QuantSpec
from . import fisher, gram, kl
from .base import Candidate, Candidates, Losses
from .cache import kept_losses

__all__ = ["Candidate", "Candidates", "Estimator", "Losses", "kept_losses", "measure"]

Estimator = Literal["fisher", "gram", "kl"]


def measure(
    estimator: Estimator,
    run: Run,
    tokens: torch.Tensor,
    folder: Path,
    candidates: Candidates,
    tables: dict[str, list[QuantSpec]] | None = None,
) -> Losses:
    """Return the candidates of every linear that the plan quantizes, with their losses.

    tokens: the calibration set (samples, T), int64. folder: for temporary files. tables: candidates of the weights
    outside the blocks, by name; only fisher rates them. Tensors there may be gone from memory afterwards.
    """
    if estimator == "fisher":
        return fisher.measure(run, tokens, folder, candidates, tables)
    assert not tables, "allocate has refused this"
    measures = {"gram": gram.measure, "kl": kl.measure}
    return measures[estimator](run, tokens, folder, candidates)
