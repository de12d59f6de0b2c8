"""Gradients at the inputs of packed weights are those of the unpacked weight, and nothing is kept for them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from quantc.kernels import reference, registry
from quantc.kernels.base import Kernel
from quantc.kernels.cpu.native import NATIVE
from quantc.kernels.cpu.torch_int4 import TORCH_INT4
from quantc.kernels.cpu.trellis import NATIVE_TRELLIS
from quantc.kernels.reference import REFERENCE
from quantc.spec import QuantSpec
from tests.kernels.weights import SPECS, K, N, filled

KERNELS: list[tuple[Kernel, ...]] = [(NATIVE, NATIVE_TRELLIS, REFERENCE), (REFERENCE,), (TORCH_INT4, REFERENCE)]
KINDS = {**SPECS, "rotated, low-rank": QuantSpec(3, 16, rank=2, hadamard=32), "of values": QuantSpec(4, 32, code="nf4")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels[0].name)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_unpacked_weight(
    monkeypatch: pytest.MonkeyPatch, kind: str, kernels: tuple[Kernel, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(registry, "KERNELS", kernels)
    monkeypatch.setattr(reference, "BLOCK_VALUES", 7 * K)  # several blocks, the last one shorter
    module = filled(KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for size in [(K,), (1, K), (2, 17, K)]:
        x = torch.randn(size, generator=generator).to(dtype).requires_grad_()
        bias = torch.randn(N, generator=generator).to(dtype).requires_grad_()
        at_y = torch.randn(*size[:-1], N, generator=generator).to(dtype)
        found = torch.autograd.grad(module.multiply(x, bias=bias), (x, bias), at_y)
        y = F.linear(x.double(), module.dequantize(torch.float64), bias.double())
        expected = torch.autograd.grad(y, (x, bias), at_y.double())
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            scale = float(other.abs().max())
            # Another order of sums, and in bfloat16 weights and panels' sums are rounded too.
            torch.testing.assert_close(one, other, rtol=0, atol=scale * 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels[0].name)
def test_nothing_is_kept_for_gradients(monkeypatch: pytest.MonkeyPatch, kernels: tuple[Kernel, ...]) -> None:
    monkeypatch.setattr(registry, "KERNELS", kernels)
    module, kept = filled(SPECS["low-rank"]), []
    x = torch.randn(3, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        y = module(x)
    assert y.requires_grad
    assert kept == []


def test_the_product_is_that_of_inference() -> None:
    module = filled(SPECS["rotated"])
    x = torch.randn(3, K, requires_grad=True)
    with torch.no_grad():
        expected = module(x)
    assert torch.equal(module(x), expected)
    assert not module(x.detach()).requires_grad
