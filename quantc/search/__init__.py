"""A plan refined by evolutionary search on measured KL divergence; see `refine`."""

from __future__ import annotations

from .refinement import Refined, refine

__all__ = ["Refined", "refine"]
