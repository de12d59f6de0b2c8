"""What rounding the inputs of linears costs: the rounding is llama.cpp's, and the losses are those of whole models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantc.calibration.tokens import tokenize_documents
from quantc.pipeline.run import Run
from quantc.sensitivity import Losses, kept_losses, measure
from quantc.sensitivity.inputs import inputs_error
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import opened_run, save_with_tokenizer

MODEL = Path(__file__).parents[2] / "tiny_model" / "model"
SPEC = QuantSpec(4, 32)
BLOCKS = (4, 8)  # that divide all widths of the model


def run_with_reader(folder: Path, blocks: tuple[int, ...] = BLOCKS) -> Run:
    run = opened_run(folder)
    run.plan.specs.update(dict.fromkeys(run.graph.linears, SPEC))
    run.container = SimpleNamespace(input_blocks=blocks)  # type: ignore[assignment]
    return run


def rated(run: Run, tokens: torch.Tensor, folder: Path) -> Losses:
    tables = {name: [SPEC] for name in run.graph.outside_weights}
    return measure("fisher", run, tokens, folder, lambda _: [SPEC], tables)


def measured(model: PreTrainedModel, tokens: torch.Tensor, modules: list[nn.Module], block: int) -> float:
    """KL divergence, in nats per token, with the inputs of some modules rounded."""

    def rounded(_: nn.Module, inputs: Any) -> torch.Tensor:
        return inputs[0] + inputs_error(inputs[0], block)

    with torch.no_grad():
        before = F.log_softmax(model(tokens).logits.double(), -1)
        hooks = [module.register_forward_pre_hook(rounded) for module in modules]
        after = F.log_softmax(model(tokens).logits.double(), -1)
    for hook in hooks:
        hook.remove()
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_inputs_are_rounded_as_in_blocks_of_a_file() -> None:
    """Q8_0 has its scales in float16: that is all that differs."""
    quants = pytest.importorskip("gguf.quants")
    kind = pytest.importorskip("gguf").GGMLQuantizationType.Q8_0
    rows = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    rows[0, 40] = 30
    rows[1] = 0
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(rows.numpy(), kind), kind).astype(np.float32))
    torch.testing.assert_close(rows + inputs_error(rows, 32), theirs, rtol=2.0**-10, atol=0)
    wide, narrow = (inputs_error(rows[:1], block)[0, 64:].square().sum() for block in (96, 32))
    assert wide > 10 * narrow  # one large value costs all that are rounded with it


def test_a_trained_model_loses_what_is_predicted(tmp_path: Path) -> None:
    stories = (MODEL.parent / "heldout.txt").read_text().split("<|endoftext|>")
    tokens = tokenize_documents(AutoTokenizer.from_pretrained(MODEL), stories, samples=16, seq_len=128, seed=0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    run = run_with_reader(MODEL)
    losses, head = rated(run, tokens, tmp_path).inputs, next(iter(run.graph.outside_weights))
    for block in BLOCKS:
        linears = [model.get_submodule(name) for name in run.graph.linears]
        predicted = sum(losses[name][block] for name in run.graph.linears)
        assert predicted == pytest.approx(measured(model, tokens, linears, block), rel=0.2)
        truth = measured(model, tokens, [model.get_output_embeddings()], block)
        assert losses[head][block] == pytest.approx(truth, rel=0.6)
    assert all(of[4] < of[8] for of in losses.values())


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "mixtral"])
def test_other_kinds_of_models(family: str, tmp_path: Path) -> None:
    """Weights that are stored transposed; an embedding that is no head has no inputs, and of stacks none are rated."""
    save_with_tokenizer(build(family), tmp_path)
    tokens = torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    run = run_with_reader(tmp_path, (8, 10**6))
    found = rated(run, tokens, tmp_path).inputs
    for name, linear in run.graph.linears.items():
        assert (name in found) is (linear.kind != "stack")
    assert all(set(of) <= {8} for of in found.values())
    assert all(loss > 0 for of in found.values() for loss in of.values())


def test_they_are_kept_on_disk_by_reader(tmp_path: Path) -> None:
    run, tokens = run_with_reader(MODEL), torch.zeros(1, 8, dtype=torch.int64)
    question: tuple[Any, ...] = (run, tokens, "fisher", {"a": [SPEC]})
    kept_losses(*question, lambda: Losses({}, inputs={"a": {32: 0.25, 64: 0.5}}))
    assert kept_losses(*question, lambda: Losses({})).inputs == {"a": {32: 0.25, 64: 0.5}}
    run.container = None
    assert kept_losses(*question, lambda: Losses({})).inputs == {}
