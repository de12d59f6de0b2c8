"""Losses of embeddings and heads against what rounding them does to the whole model's predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantc.calibration.tokens import tokenize_documents
from quantc.numerics.basis import Basis
from quantc.sensitivity import measure
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import opened_run, save_with_tokenizer

MODEL = Path(__file__).parents[2] / "tiny_model" / "model"
SPECS = [QuantSpec(bits, 32) for bits in (3, 4, 6, 8)]


def predicted(folder: Path, tokens: torch.Tensor) -> dict[str, list[float]]:
    """By table, the losses of SPECS; no linear inside the blocks is rated."""
    run = opened_run(folder)
    run.plan.specs.update(dict.fromkeys(run.graph.linears))
    tables = dict.fromkeys(run.graph.outside_weights, SPECS)
    found = measure("fisher", run, tokens, folder, lambda _: [], tables)
    return {name: [candidate.loss for candidate in found[name]] for name in tables}


def measured(model: PreTrainedModel, tokens: torch.Tensor, name: str, spec: QuantSpec) -> float:
    """KL divergence, in nats per token, with one table rounded to nearest."""
    table = model.get_parameter(name)
    original = table.data
    with torch.no_grad():
        before = F.log_softmax(model(tokens).logits.double(), -1)
        table.data = Basis.unguided(None, 0, 0).round(original, spec).dequantize()
        after = F.log_softmax(model(tokens).logits.double(), -1)
        table.data = original
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_a_trained_model_loses_what_is_predicted() -> None:
    stories = (MODEL.parent / "heldout.txt").read_text().split("<|endoftext|>")
    tokens = tokenize_documents(AutoTokenizer.from_pretrained(MODEL), stories, samples=16, seq_len=128, seed=0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ((name, losses),) = predicted(MODEL, tokens).items()  # tied: one table in both places
    for spec, loss in zip(SPECS, losses, strict=True):
        assert loss == pytest.approx(measured(model, tokens, name, spec), rel=0.4)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_tables_of_other_kinds_of_models(family: str, tmp_path: Path) -> None:
    """Tied and untied, scaled embeddings, positions added to them: losses of random models, which are all small."""
    save_with_tokenizer(build(family), tmp_path)
    tokens = torch.randint(3, VOCAB, (8, 32), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, losses in predicted(tmp_path, tokens).items():
        assert losses == sorted(losses, reverse=True)
        truth = measured(model, tokens, name, SPECS[1])
        assert truth / 2.5 < losses[1] < truth * 2.5
