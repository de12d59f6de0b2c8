"""Weights with dropped groups that the tests of the CUDA kernels share."""

from __future__ import annotations

import torch

from quantc.formats import GROUP_SPARSE
from quantc.kernels.cuda import kept_layout
from quantc.kernels.cuda.kept_layout import KeptWeight
from quantc.numerics.qtensor import QTensor
from quantc.spec import QuantSpec
from tests.kernels.test_kernels import random_qtensor


def random_kept(spec: QuantSpec, shape: tuple[int, int], uneven: bool = False) -> QTensor:
    """A normal weight on its grid without some groups: any, or first those of the last rows, which are empty then."""
    tensor = random_qtensor(spec, shape)
    rows, columns = spec.scales_shape(shape)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(5))
    if uneven:
        scores -= torch.arange(rows).unsqueeze(1)
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True)[: spec.kept_groups(shape)]] = True
    tensor.kept = kept.view(rows, columns)
    return GROUP_SPARSE.unpack(GROUP_SPARSE.pack(tensor), spec, shape)


def prepare(tensor: QTensor) -> KeptWeight:
    return kept_layout.prepare(GROUP_SPARSE.pack(tensor), tensor.spec, tensor.shape)
