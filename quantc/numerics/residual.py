"""The rotation of a whole residual stream: the randomised Hadamard rotation R, after one reflection.

Q = P R with P = I - 2 w w^T, w along R u - u, u = (1, ..., 1) / sqrt(K). P swaps R u and u, so that Q u = u: Q leaves
the mean of a vector as it is. So it commutes with subtracting the mean, and a norm that does that, with a gain of
one, gives the rotated output for a rotated input, as a norm that does not subtract it does for any rotation.
"""

from __future__ import annotations

import functools

import torch

from .hadamard import CPU, rotate, rotate_back


def turn(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rotate floating x (..., K) by Q, dtype kept; half types are computed in float32."""
    work = x if x.dtype in (torch.float64, torch.float32) else x.float()
    return rotate(_reflect(work, block), block).to(x.dtype)


def turn_back(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rotate floating x (..., K) by Q^T, the inverse of turn."""
    work = x if x.dtype in (torch.float64, torch.float32) else x.float()
    return _reflect(rotate_back(work, block), block).to(x.dtype)


def _reflect(x: torch.Tensor, block: int) -> torch.Tensor:
    mirror = _mirror(x.shape[-1], block, x.dtype, x.device)
    return x - 2 * (x * mirror).sum(-1, keepdim=True) * mirror


@functools.cache
def _mirror(width: int, block: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return w, of length one, or zero where R leaves the mean as it is by itself."""
    with torch.inference_mode(False):  # else a cached tensor could not serve autograd later
        ones = torch.full((width,), width**-0.5, dtype=torch.float64, device=CPU)
        difference = rotate_back(ones, block) - ones
        length = float(difference.norm())
        return (difference / length if length > 1e-9 else 0 * difference).to(device, dtype)
