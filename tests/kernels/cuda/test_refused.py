"""What the CUDA operators do not multiply is refused before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from quantc.kernels.cuda import dense, kept, kept_layout, layout, product
from quantc.spec import QuantSpec
from tests.kernels.weights import K, N, stored

SPECS = {dense: QuantSpec(4, 32, rank=3), kept: QuantSpec(5, 16, sparsity=0.5, rank=3)}
OPERATORS = {dense: dense.CUDA_PACKED, kept: kept.CUDA_KEPT}
PREPARE: dict[Any, Callable[..., Any]] = {dense: layout.prepare, kept: kept_layout.prepare}
every_operator = pytest.mark.parametrize("module", SPECS, ids=["dense", "kept"])


def prepared(module: Any) -> Any:
    return PREPARE[module](stored(SPECS[module]), SPECS[module], (N, K))


def on_meta(weight: Any) -> Any:
    tensors = {name: value.to("meta") for name, value in vars(weight).items() if isinstance(value, torch.Tensor)}
    return replace(weight, **tensors)


@every_operator
def test_what_a_linear_refuses(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is launched, and as a compiler asks for shapes."""
    monkeypatch.setattr(product, "launch", lambda _: pytest.fail("something was launched"))
    linear = nn.Linear(K, N, bias=False, dtype=torch.float16)
    weight, shapes_only = prepared(module), on_meta(prepared(module))
    for shape in [(1, 2 * K), (1, 4096 * K), (4096, 2 * K), (0, 2 * K), (K - 1,), (2, 3, K + 8), (0,), ()]:
        x = torch.zeros((), dtype=torch.float16).expand(shape)
        with pytest.raises(RuntimeError) as wanted:
            linear(x)
        with pytest.raises(RuntimeError) as found:
            module.multiply(x, weight, None)
        assert str(found.value) == str(wanted.value)
        with pytest.raises(RuntimeError) as found:
            OPERATORS[module].run(x.to("meta"), shapes_only)
        assert str(found.value).startswith(str(wanted.value))
    x = torch.zeros(2, K, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="must have the same dtype, but got int64 and a packed weight"):
        module.multiply(x.long(), weight, None)
    with pytest.raises(RuntimeError, match="must have the same dtype, but got float32 and a packed weight"):
        module.multiply(x.float(), weight, None)
    with pytest.raises(RuntimeError, match=r"a bias \(47,\) cannot be added to 48 outputs; it must be \(48,\)"):
        module.multiply(x, weight, torch.zeros(N - 1))
    with pytest.raises(RuntimeError, match="found at least two devices, meta and cpu!"):
        module.multiply(x.to("meta"), weight, None)


@every_operator
def test_tensors_that_are_no_weight_of_its_size(module: Any) -> None:
    weight = prepared(module)
    for name, value in vars(weight).items():
        if isinstance(value, torch.Tensor):
            for wrong in (value[:-1], torch.cat([value, value[:1]]), value.double(), value[None]):
                with pytest.raises(ValueError, match=" must be contiguous .*, and is "):
                    replace(weight, **{name: wrong})
    with pytest.raises(ValueError, match=" must be contiguous .*, and is | do not cover "):
        replace(weight, shape=(N + 64, K + 64))


def test_groups_that_do_not_cover_the_inputs() -> None:
    with pytest.raises(ValueError, match="2 groups of 16 do not cover 64"):
        replace(prepared(dense), group=16)
