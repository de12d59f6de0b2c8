"""The pass importance: its streamed backward sweep against plain autograd, and the weights made of the gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantc.calibration import hidden_states, precision, stream
from quantc.calibration.stream import CalibrationRun
from quantc.graph.model_graph import ModelGraph
from quantc.passes.importance import LARGEST_WEIGHT, TEMPER, Importance, ImportanceConfig, _tempered
from quantc.pipeline.sweep import analyse
from quantc.sensitivity import backward
from tests.families import VOCAB, build
from tests.helpers import opened_run

TOKENS = torch.randint(0, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
MODELS = ["llama", "gpt2", "mixtral", "gemma3_text"]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products in float32, and a batch for every sample, so that batches are put together too."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    monkeypatch.setattr(stream, "BATCH_TOKENS", TOKENS.shape[1])


def analysed(folder: Path, seed: int = 0) -> CalibrationRun:
    """The calibration run of a saved model after the analysis, its states put back as in a real run."""
    run = opened_run(folder)
    states = CalibrationRun(run.source.model, run.graph, TOKENS, run.device)
    analyse(run, [Importance(ImportanceConfig(seed))], states, TOKENS, folder)
    return states


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def expected_weights(model: PreTrainedModel, graph: ModelGraph, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same by one backward pass over the whole model for each sample, with the tokens drawn in the same order."""
    generator = torch.Generator().manual_seed(seed)
    watched = [linear for block in graph.blocks for linear in block.quantized if linear.kind != "stack"]
    squares: dict[str, list[torch.Tensor]] = {linear.reads: [] for linear in watched}
    for sample in TOKENS:
        outputs: dict[str, torch.Tensor] = {}
        hooks = [keep_output(model.get_submodule(linear.name), outputs, linear.name) for linear in watched]
        embeddings = model.get_input_embeddings()(sample[None]).requires_grad_()
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        logits.log_softmax(-1).gather(1, drawn).sum().backward()
        for hook in hooks:
            hook.remove()
        for label, rows in squares.items():
            gradients = [outputs[linear.name].grad for linear in watched if linear.reads == label]
            rows.append(
                sum((gradient.square().sum(-1).reshape(-1) for gradient in gradients), torch.zeros(len(sample)))
            )
    return {label: weights_of(torch.stack(rows)) for label, rows in squares.items()}


def keep_output(module: nn.Module, outputs: dict[str, torch.Tensor], name: str) -> Any:
    def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    return module.register_forward_hook(keep)


def weights_of(squares: torch.Tensor) -> torch.Tensor:
    weights = (squares / squares.mean()).clamp(max=LARGEST_WEIGHT) ** TEMPER
    return weights / weights.mean()


# Gradients


@pytest.mark.parametrize("name", [*MODELS, "qwen2_moe"])
def test_the_streamed_sweep_gives_the_gradients_of_the_whole_model(
    name: str, tmp_path: Path, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward, "STORED_DTYPE", torch.float32)
    model = build(name)
    states = analysed(saved(model, tmp_path))
    found, expected = states.weights, expected_weights(model, states.graph)
    assert found.keys() == expected.keys()
    for label, weights in found.items():
        assert weights.std() > 0.01, label
        torch.testing.assert_close(weights, expected[label], rtol=1e-3, atol=1e-4, msg=label)


@pytest.mark.parametrize("name", MODELS)
def test_states_kept_in_bfloat16_move_the_weights_little(
    name: str, tmp_path: Path, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(probabilities: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.arange(len(probabilities))[:, None]  # a draw that rounding cannot turn

    monkeypatch.setattr(torch, "multinomial", draw)
    model = build(name)
    states = analysed(saved(model, tmp_path))
    found, expected = states.weights, expected_weights(model, states.graph)
    for label, weights in found.items():
        assert (weights - expected[label]).norm() < 0.05 * expected[label].norm(), label


def test_rows_of_a_part_of_the_tokens_are_not_weighed(tmp_path: Path, exact: None) -> None:
    run = opened_run(saved(build("llama"), tmp_path))
    part = run.source.model.model.layers[0].mlp
    whole = type(part).forward
    part.forward = lambda states: torch.cat([whole(part, states[:, :-1]), states[:, -1:]], 1)
    states = CalibrationRun(run.source.model, run.graph, TOKENS, run.device)
    analyse(run, [Importance(ImportanceConfig())], states, TOKENS, tmp_path)
    labels = {item.label for block in run.graph.blocks for item in block.activations}
    unweighed = {label for label in labels if "layers.0.mlp" in label}
    assert len(unweighed) == 2
    assert states.weights.keys() == labels - unweighed
    assert run.report.rewrites == {"importance": {"activations": len(labels) - 2}}


# Weights


def test_weights_have_mean_one_and_follow_the_seed(tmp_path: Path) -> None:
    saved(build("llama"), tmp_path)
    weights, again, other = analysed(tmp_path).weights, analysed(tmp_path).weights, analysed(tmp_path, seed=1).weights
    assert len(weights) == 8
    for label, found in weights.items():
        assert found.shape == TOKENS.shape
        assert found.mean() == pytest.approx(1, abs=1e-5)
        assert found.min() >= 0
        assert torch.equal(found, again[label])
        assert not torch.equal(found, other[label])


def test_gradients_that_are_all_alike_weigh_alike() -> None:
    torch.testing.assert_close(_tempered(torch.full((2, 5), 3e-9)), torch.ones(2, 5))


def test_without_gradients_rows_count_alike(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight.data.zero_()  # nothing of what gate and up put out goes on
    labels = analysed(saved(model, tmp_path)).weights.keys()
    assert {label for label in labels if "layers.0.mlp" in label} == {"model.layers.0.mlp.down_proj:in"}


def test_a_token_of_huge_gradients_does_not_silence_the_others() -> None:
    weights = _tempered(torch.tensor([[1.0] * 999 + [1e6]]))
    assert weights.max() / weights.median() == pytest.approx((LARGEST_WEIGHT * 1001) ** TEMPER, rel=0.05)
    assert weights.mean() == pytest.approx(1, abs=1e-5)


# What is left behind


@pytest.mark.parametrize("spill_bytes", [hidden_states.SPILL_BYTES, 0], ids=["in_memory", "in_a_file"])
def test_the_run_goes_on_from_the_states_before_the_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spill_bytes: int
) -> None:
    monkeypatch.setattr(hidden_states, "SPILL_BYTES", spill_bytes)
    run = opened_run(saved(build("mixtral"), tmp_path))
    states = CalibrationRun(run.source.model, run.graph, TOKENS, run.device)
    before = [(start, hidden.clone()) for start, hidden in states.states()]
    seen: list[torch.Tensor] = []

    class Looking(Importance):
        def analyse(self, *args: Any) -> None:
            super().analyse(*args)
            seen.extend(hidden.clone() for _, hidden in states.states())

    analyse(run, [Looking(ImportanceConfig())], states, TOKENS, tmp_path)
    after = list(states.states())
    assert [start for start, _ in after] == [start for start, _ in before]
    assert all(torch.equal(old, new) for (_, old), (_, new) in zip(before, after, strict=True))
    assert not any(torch.equal(old, moved) for (_, old), moved in zip(before, seen, strict=True))
    modules = list(run.source.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(parameter.is_meta for parameter in run.source.model.parameters())
