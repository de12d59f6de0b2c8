"""Predicted losses against measured ones on a small trained model; what candidates a prediction is made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantc.calibration.tokens import tokenize_documents
from quantc.numerics.grids import fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.sensitivity import Candidate, measure
from quantc.spec import QuantSpec
from tests.helpers import opened_run

MODEL = Path(__file__).parents[2] / "tiny_model" / "model"
SPEC = QuantSpec(4, 32)
WIDTHS = [replace(SPEC, bits=bits) for bits in (2, 3, 4, 8)]


def predicted(folder: Path, tokens: torch.Tensor, rounding_feedback: bool = False) -> dict[str, list[Candidate]]:
    run = opened_run(folder)
    run.plan.specs.update(dict.fromkeys(run.graph.linears, SPEC))
    run.rounding = replace(run.rounding, feedback=rounding_feedback)
    return measure("fisher", run, tokens, folder, lambda _: WIDTHS)


def total_loss(chosen: dict[str, QuantSpec], candidates: dict[str, list[Candidate]]) -> float:
    return sum(item.loss for name, items in candidates.items() for item in items if item.spec == chosen[name])


def measured(model: PreTrainedModel, tokens: torch.Tensor, name: str, spec: QuantSpec) -> float:
    """KL divergence, in nats per token, with one linear rounded to nearest."""
    weight = model.get_submodule(name).get_parameter("weight")
    with torch.no_grad():
        before = F.log_softmax(model(tokens).logits.double(), -1)
        original = weight.clone()
        grid = fit_grid(original, spec)
        weight.copy_(QTensor(spec, round_to_nearest(original, grid, spec), grid.scales, grid.zeros).dequantize())
        after = F.log_softmax(model(tokens).logits.double(), -1)
        weight.copy_(original)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.fixture(scope="module")
def tiny_tokens() -> torch.Tensor:
    stories = (MODEL.parent / "heldout.txt").read_text().split("<|endoftext|>")
    return tokenize_documents(AutoTokenizer.from_pretrained(MODEL), stories, samples=12, seq_len=128, seed=0)


def test_predictions_rank_linears_as_measuring_does(tiny_tokens: torch.Tensor) -> None:
    found = predicted(MODEL, tiny_tokens)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    at_three = {name: next(c.loss for c in items if c.spec.bits == 3) for name, items in found.items()}
    truth = {name: measured(model, tiny_tokens, name, WIDTHS[1]) for name in found}
    names = list(found)
    ranks = torch.tensor([[values[name] for name in names] for values in (at_three, truth)]).argsort().argsort().float()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
    ratios = torch.tensor([at_three[name] / truth[name] for name in names])
    assert 1 / 3 < float(ratios.median()) < 3


def test_more_bits_lose_less_and_feedback_loses_less_than_none(tiny_tokens: torch.Tensor) -> None:
    plain, fed_back = predicted(MODEL, tiny_tokens), predicted(MODEL, tiny_tokens, rounding_feedback=True)
    totals = [total_loss(dict.fromkeys(plain, spec), plain) for spec in WIDTHS]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 10 * totals[-1] > 0
    chosen = dict.fromkeys(plain, WIDTHS[1])
    assert total_loss(chosen, fed_back) < total_loss(chosen, plain)
