"""Rotations that vLLM makes while it runs: compressed-tensors' `transform_config`, and the matrices for it.

Read in vLLM 0.32 (compressed_tensors/transform). It keeps one matrix for all modules of a scheme, so that it is stored
once, under the name of the first of them. Other kinds than "random-hadamard" are made by a kernel that has no signs.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch

from ...numerics.hadamard import rotation
from .base import Described


def transform_config(described: Described) -> dict[str, Any]:
    """Return the schemes, one for each order of blocks."""
    groups = {}
    for order, modules in _by_order(described).items():
        names = [each for name in modules for each in dict.fromkeys((described.aliases.get(name, name), name))]
        apply = {"targets": names, "location": "input", "inverse": False, "ignore": []}
        groups[_scheme(order)] = {"type": "random-hadamard", "head_dim": order, "apply": [apply]}
    return {"config_groups": groups}


def rotation_matrices(described: Described) -> dict[str, torch.Tensor]:
    """Return S (n, n) of +-1, float32, for each order n: inputs x become x S / sqrt(n)."""
    return {
        f"{modules[0]}.{_scheme(order)}_input.weight": (rotation(order, order) * sqrt(order)).round().float()
        for order, modules in _by_order(described).items()
    }


def _by_order(described: Described) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, order in described.rotations.items():
        found.setdefault(order, []).append(name)
    return found


def _scheme(order: int) -> str:
    return f"hadamard_{order}"
