"""Weights that stay half floats in a model that is computed in another dtype."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import quantc
from quantc.machine import compute_dtype
from quantc.runtime import half_weights
from quantc.runtime.half_weights import HalfEmbedding, HalfLinear, keep_half
from tests.families import build
from tests.helpers import save_with_tokenizer

HALVES = [torch.bfloat16, torch.float16]
TOKENS = torch.tensor([[3, 17, 42, 99, 3, 7, 120, 64]])


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of half floats; every weight is large, and takes several panels."""
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: 4.0)
    monkeypatch.setattr(half_weights, "LEAST_VALUES", 1)
    monkeypatch.setattr(half_weights, "PANEL_VALUES", 200)


class Tied(nn.Module):
    """An embedding and a head on one table."""

    def __init__(self, stored: torch.dtype, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 24), nn.Linear(24, 50)
        table = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(stored).to(dtype)
        self.embed.weight = self.head.weight = nn.Parameter(table)
        self.head.bias = nn.Parameter(self.head.bias.detach().to(dtype))


def is_sum_of_products(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Within what any order of float32 sums, and one rounding to y's dtype, can differ from the exact products."""
    exact = F.linear(x.double(), weight.double(), bias.double())
    terms = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
    bound = (x.shape[-1] + 1) * 2.0**-24 * terms + torch.finfo(y.dtype).eps / 2 * 1.01 * exact.abs()
    return bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.parametrize("rows", [1, 3, 4, 17])
def test_products_are_those_of_float32(stored: torch.dtype, rows: int) -> None:
    model = Tied(stored)
    weight = model.head.weight.detach().clone()
    assert keep_half(model, stored) == ["embed.weight"]
    assert model.embed.weight is model.head.weight
    assert model.head.weight.dtype == stored
    x = torch.randn(2, rows, 24)
    y = model.head(x)
    assert (y.dtype, y.shape) == (torch.float32, (2, rows, 50))
    assert is_sum_of_products(y, x, weight, model.head.bias)
    ids = torch.tensor([[0, 49, 7]])
    assert torch.equal(model.embed(ids), weight[ids])
    strided = torch.randn(24, rows).T
    assert is_sum_of_products(model.head(strided), strided, weight, model.head.bias)
    assert model.head(torch.empty(0, 24)).shape == (0, 50)


@pytest.mark.parametrize("stored", HALVES)
def test_a_model_in_half_floats_sums_in_float32(stored: torch.dtype) -> None:
    """From 4 rows on; torch, which has fewer, sums them in float32 too."""
    model = Tied(stored, stored)
    assert keep_half(model, torch.float32) == ["embed.weight"]
    for rows in (4, 9):
        x = torch.randn(rows, 24).to(stored)
        y = model.head(x)
        assert y.dtype == stored
        assert is_sum_of_products(y, x, model.head.weight, model.head.bias)
    assert torch.equal(model.head(x[:3]), F.linear(x[:3], model.head.weight, model.head.bias))
    assert model.embed(TOKENS % 50).dtype == stored


def test_what_would_change_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Embedding):
        """Asks its table for a dtype, as some models do."""

    model = Tied(torch.bfloat16)
    assert keep_half(model, torch.float32) == []
    monkeypatch.setattr(half_weights, "LEAST_VALUES", 50 * 24 + 1)
    assert keep_half(model, torch.bfloat16) == []
    monkeypatch.undo()
    monkeypatch.setattr(half_weights, "LEAST_VALUES", 1)
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: 0.6)
    assert keep_half(model, torch.bfloat16) == []
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: 4.0)
    with torch.no_grad():
        model.head.weight[49, 23] += 2.0**-20  # what bfloat16 does not hold
    assert keep_half(model, torch.bfloat16) == []
    model = Tied(torch.bfloat16)
    model.embed.__class__ = Scaled
    assert keep_half(model, torch.bfloat16) == []
    assert isinstance(model.head.weight, nn.Parameter)


def test_casts_copies_and_gradients() -> None:
    model = Tied(torch.bfloat16)
    weight = model.head.weight.detach().clone()
    keep_half(model, torch.bfloat16)
    x = torch.randn(5, 24, requires_grad=True)
    model.head(x).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(5, 24), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    assert type(twin.head) is HalfLinear
    twin.to(torch.float16)
    assert twin.embed(TOKENS % 50).dtype == twin.head(x.detach().half()).dtype == torch.float16
    assert model.embed(TOKENS % 50).dtype == torch.float32
    model.float()
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head(x.detach()), F.linear(x.detach(), weight, model.head.bias))
    assert set(model.state_dict()) == {"embed.weight", "head.weight", "head.bias"}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize(("family", "kept"), [("llama", 2), ("qwen2", 1)])
def test_a_loaded_checkpoint_keeps_them_and_is_saved_with_them(
    family: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama's head is its own, qwen2's is tied to the embedding."""
    original = build(family).to(torch.bfloat16)
    original.config.dtype = torch.bfloat16
    save_with_tokenizer(original, tmp_path / "original")
    out = tmp_path / "packed"
    quantc.quantize(tmp_path / "original", bits=4, group_size=32, head_bits="keep", method="rtn", out=out)
    monkeypatch.setattr(half_weights, "LEAST_VALUES", 1 << 40)
    plain = logits(quantc.load(out))
    monkeypatch.setattr(half_weights, "LEAST_VALUES", 1000)
    model = quantc.load(out)
    assert model.dtype == torch.float32
    halves = [module for module in model.modules() if isinstance(module, HalfEmbedding | HalfLinear)]
    assert len(halves) == 2
    assert len({module.weight.data_ptr() for module in halves}) == kept
    found = logits(model)
    assert found.dtype == torch.float32
    assert (found - plain).norm() <= 1e-5 * plain.norm()
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(quantc.load(tmp_path / "copy")), plain)  # its config names float32
    compiled = quantc.load(out, compile=True)
    assert not any(isinstance(module, HalfEmbedding | HalfLinear) for module in compiled.modules())
