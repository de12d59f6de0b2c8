"""What storing a linear in fewer bits would cost the model: a loss for every linear and every candidate.

Estimators answer the same question at different prices: `fisher` by gradients, `gram` by output errors alone, `kl` by
measuring. See docs/results.md for how well each ranks and predicts.
"""

from .base import Candidate, Candidates, Losses
from .fisher import measure
from .table import kept_losses

__all__ = ["Candidate", "Candidates", "Losses", "kept_losses", "measure"]
