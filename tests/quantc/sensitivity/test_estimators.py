"""The estimators of losses, side by side; measured losses against whole models run with rounded weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

import quantc
from quantc.calib_data import load_documents
from quantc.calibration.tokens import tokenize_documents
from quantc.errors import CalibrationError
from quantc.frontend import open_model
from quantc.graph.model_graph import Linear
from quantc.numerics.grids import fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.numerics.statistics import output_energy
from quantc.pipeline.run import Run
from quantc.sensitivity import Estimator, Losses, kl, measure
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import in_memory_run, opened_run
from tests.quantc.calibration.test_gather import listed_mixtral
from tests.whole.test_families import put_rounded_weights

MODEL = Path(__file__).parents[2] / "tiny_model" / "model"
TEXT = MODEL.parent / "heldout.txt"
SPEC = QuantSpec(3, 32)
WIDTHS = [replace(SPEC, bits=bits) for bits in (2, 3, 4, 8)]
RANDOM_TOKENS = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


def planned_run(folder: Path, feedback: bool) -> Run:
    run = opened_run(folder)
    run.plan.specs.update(dict.fromkeys(run.graph.linears, SPEC))
    run.rounding = replace(run.rounding, feedback=feedback)
    return run


def stories(samples: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """The windows that `quantize` calibrates on."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return tokenize_documents(tokenizer, load_documents(str(TEXT)), samples, seq_len, seed)


def whole(folder: Path) -> PreTrainedModel:
    return open_model(folder).load_whole(torch.float32).requires_grad_(False)


def log_probabilities(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return F.log_softmax(model(tokens, use_cache=False).logits.double(), -1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence in nats per token, of log-probabilities."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def to_nearest(weight: torch.Tensor, linear: Linear, spec: QuantSpec) -> torch.Tensor:
    """A weight as the model stores it, every expert rounded by itself."""
    matrices = (weight.mT if linear.transposed else weight).reshape(-1, *linear.shape)
    rounded = []
    for matrix in matrices:
        grid = fit_grid(matrix, spec)
        rounded.append(QTensor(spec, round_to_nearest(matrix, grid, spec), grid.scales, grid.zeros).dequantize())
    together = torch.stack(rounded)
    return (together.mT if linear.transposed else together).reshape(weight.shape)


def saved(family: str, folder: Path) -> Path:
    build(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["tiny_model", "mixtral", "gpt_oss", "gpt2"])
def test_measured_losses_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = MODEL if family == "tiny_model" else saved(family, tmp_path)
    tokens = stories(3, 40) if family == "tiny_model" else RANDOM_TOKENS
    run, model = planned_run(folder, feedback=False), whole(folder)
    expected = log_probabilities(model, tokens)
    found = measure("kl", run, tokens, tmp_path, lambda _: [SPEC, WIDTHS[-1]])
    assert found.keys() == run.graph.linears.keys()
    for name, linear in run.graph.linears.items():
        original = model.get_parameter(linear.weight_name)
        weight = original.clone()
        for candidate in found[name]:
            original.copy_(to_nearest(weight, linear, candidate.spec))
            truth = divergence(expected, log_probabilities(model, tokens))
            assert candidate.loss == pytest.approx(truth, rel=1e-3, abs=1e-11)
        original.copy_(weight)


def test_measured_beside_the_rounded_model_that_quantize_makes(tmp_path: Path) -> None:
    """A candidate of the base's own width costs what rounding that linear as the last one adds."""
    settings = {"samples": 6, "seq_len": 48, "calib": str(TEXT), "group_size": SPEC.group_size, "preset": "fast"}
    quantc.quantize(MODEL, out=tmp_path / "packed", bits=SPEC.bits, symmetric=False, head_bits="keep", **settings)
    measured, model = stories(kl.SAMPLES, 48, seed=3), whole(MODEL)
    original = log_probabilities(model, measured)
    run = planned_run(MODEL, feedback=True)
    run.rounding = replace(run.rounding, shrink=0.15)  # of fast
    weights = {name: model.get_submodule(name).weight.clone() for name in run.graph.linears}
    put_rounded_weights(model, tmp_path / "packed")
    rounded = divergence(original, log_probabilities(model, measured))

    tokens = torch.cat([measured, stories(6, 48)])
    found = kl.measure(run, tokens, tmp_path, lambda _: [SPEC], base=SPEC.bits)
    for name, weight in weights.items():
        parameter = model.get_submodule(name).weight
        kept, parameter.data = parameter.data, weight
        truth = rounded - divergence(original, log_probabilities(model, measured))
        parameter.data = kept
        assert found[name][0].loss == pytest.approx(max(0.0, truth), rel=1e-3, abs=1e-9)


def test_linears_without_candidates_are_not_measured(tmp_path: Path) -> None:
    run = planned_run(MODEL, feedback=False)
    chosen = list(run.graph.linears)[9]
    found = kl.measure(run, stories(2, 16), tmp_path, lambda linear: [SPEC] if linear.name == chosen else [], base=4)
    assert found.keys() == {chosen}


def test_predictions_that_are_not_finite_stop_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl, "divergence", lambda *_: float("nan"))
    run = planned_run(MODEL, feedback=False)
    with pytest.raises(CalibrationError, match="with model.layers.0.self_attn.q_proj stored as w3g32 the model's pred"):
        measure("kl", run, stories(1, 16), tmp_path, lambda _: [SPEC])


def rank_correlation(one: Losses, other: Losses) -> float:
    ranks = [torch.tensor([losses[name][0].loss for name in one]).argsort().argsort() for losses in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks).float())[0, 1])


def test_output_errors_alone_rank_linears_worse_than_gradients(tmp_path: Path) -> None:
    tokens = stories(16, 64)
    losses: dict[Estimator, Losses] = {
        estimator: measure(estimator, planned_run(MODEL, feedback=False), tokens, tmp_path, lambda _: [SPEC])
        for estimator in get_args(Estimator)
    }
    assert rank_correlation(losses["gram"], losses["kl"]) < rank_correlation(losses["fisher"], losses["kl"]) - 0.1


def test_output_errors_fall_with_every_bit(tmp_path: Path) -> None:
    found = measure("gram", planned_run(MODEL, feedback=True), stories(16, 64), tmp_path, lambda _: WIDTHS)
    totals = [sum(items[at].loss for items in found.values()) for at in range(len(WIDTHS))]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > 10 * totals[-1] > 0


def test_experts_that_no_token_reached_are_rated_by_their_weights(tmp_path: Path) -> None:
    run = in_memory_run(listed_mixtral(), **SPEC.to_dict())
    run.source.load = lambda _: None
    run.rounding = replace(run.rounding, feedback=False)
    weights = {name: run.source.model.get_submodule(name).weight.clone() for name in run.graph.linears}
    found = measure("gram", run, torch.tensor([[7]]), tmp_path, lambda _: [SPEC])
    shares = {
        name: output_energy(to_nearest(weight, run.graph.linears[name], SPEC) - weight, None)
        / output_energy(weight, None)
        for name, weight in weights.items()
    }
    by_weights = {name for name, share in shares.items() if found[name][0].loss == pytest.approx(share, rel=1e-5)}
    # Of four experts, each of three linears, a token reaches two in each of the two blocks.
    assert len(by_weights) == 2 * 2 * 3
    assert all(".experts." in name for name in by_weights)


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen2_moe", "gemma3_text"])
def test_other_kinds_of_models(family: str, estimator: Estimator, tmp_path: Path) -> None:
    run = planned_run(saved(family, tmp_path), feedback=True)
    found = measure(estimator, run, RANDOM_TOKENS, tmp_path, lambda _: WIDTHS[1:])
    assert found.keys() == run.graph.linears.keys()
    assert all([item.spec for item in items] == WIDTHS[1:] for items in found.values())
    assert all(item.loss >= 0 for items in found.values() for item in items)
    totals = [sum(items[at].loss for items in found.values()) for at in range(3)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] > 0
