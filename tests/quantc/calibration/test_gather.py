"""Stages of a block, and the rows gathered while its weights are rounded one stage after another."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantc.calibration import gather, precision, stream
from quantc.calibration.gather import gather_drifting, stages
from quantc.calibration.hooks import observed
from quantc.calibration.stream import CalibrationRun
from quantc.graph.model_graph import Activation
from quantc.graph.rewrite import weight_name
from quantc.numerics.statistics import Drift, Gram
from quantc.passes.quantize import Quantize, QuantizeConfig
from quantc.pipeline.work import BlockWork
from tests.families import FAMILIES, VOCAB, build
from tests.helpers import block_works, in_memory_run

TOKENS = torch.randint(0, VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
DAMP = 0.01


@pytest.fixture(autouse=True)
def batches_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products in float32, and two batches."""
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    monkeypatch.setattr(stream, "BATCH_TOKENS", TOKENS.numel() // 2)


def works(model: PreTrainedModel) -> list[BlockWork]:
    return list(block_works(in_memory_run(model, bits=3, group_size=32), TOKENS))


def wanted(work: BlockWork) -> list[Activation]:
    return [item for item in work.block.activations if work.readers(item)]


def short(work: BlockWork, item: Activation) -> list[str]:
    return [reader.removeprefix(work.block.name + ".") for reader in item.readers]


def rows_of(work: BlockWork, items: list[Activation]) -> dict[tuple[str, int], torch.Tensor]:
    """(label, expert) -> the rows of all batches."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def keep(label: str, expert: int, rows: torch.Tensor) -> None:
        seen.setdefault((label, expert), []).append(rows.clone())

    with observed(work.module, work.block, items, keep):
        for run in work.calibration.runs(work.block):
            run()
    return {key: torch.cat(parts) for key, parts in seen.items()}


class ListedExperts(nn.Module):
    """Stacked experts as a list of modules, the way models outside transformers often have them."""

    def __init__(self, stacked: Any):
        super().__init__()
        self.gate, self.up, self.down = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for both, down in zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True):
            for modules, weight in zip((self.gate, self.up, self.down), (*both.chunk(2), down), strict=True):
                modules.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
                modules[-1].weight.data = weight.clone()

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for index in range(len(self.down)):
            token, place = torch.where(chosen == index)
            if len(token):
                rows = hidden[token]
                rows = self.down[index](nn.functional.silu(self.gate[index](rows)) * self.up[index](rows))
                output.index_add_(0, token, rows * shares[token, place, None])
        return output


def listed_mixtral() -> PreTrainedModel:
    model = build("mixtral")
    expected = model(input_ids=TOKENS, use_cache=False).logits
    for layer in model.model.layers:
        layer.mlp.experts = ListedExperts(layer.mlp.experts)
    torch.testing.assert_close(model(input_ids=TOKENS, use_cache=False).logits, expected)
    return model


# Stages


@pytest.mark.parametrize("name", FAMILIES)
def test_no_activation_of_a_stage_depends_on_the_weights_that_read_it(name: str) -> None:
    for work in works(build(name)):
        items = wanted(work)
        found = stages(items)
        assert sorted(item.label for group in found for item in group) == sorted(item.label for item in items)
        orders = [[item.order for item in group] for group in found]
        assert [min(group) for group in orders] == sorted(min(group) for group in orders)
        assert all(group == sorted(group) for group in orders)
        read_later: set[str] = set()
        for group in reversed(found):
            read_later |= {reader for item in group for reader in item.readers}
            assert read_later.isdisjoint(writer for item in group for writer in item.writers)
        for group in found:
            if len(group) > 1:
                before = rows_of(work, group)
                for linear in (reader for item in group for reader in work.readers(item)):
                    weight = work.module.get_parameter(weight_name(work.block, linear))
                    weight.data = weight.data * 1.5
                after = rows_of(work, group)
                assert before.keys() == after.keys()
                assert all(torch.equal(rows, after[key]) for key, rows in before.items())


QKV, FEED = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
STAGES = {
    "llama": [[QKV], [["self_attn.o_proj"]], [FEED], [["mlp.down_proj"]]],
    "olmo2": [[QKV], [["self_attn.o_proj"]], [FEED], [["mlp.down_proj"]]],  # no norms before attention, feed-forward
    "gpt2": [[["attn.c_attn"]], [["attn.c_proj"]], [["mlp.c_fc"]], [["mlp.c_proj"]]],
    "cohere": [[[*QKV, *FEED]], [["self_attn.o_proj"], ["mlp.down_proj"]]],  # attention beside feed-forward
    "mamba": [[["mixer.in_proj"]], [["mixer.x_proj"]], [["mixer.out_proj"]]],
    "falcon_h1": [
        [["mamba.in_proj"], QKV],  # one norm, scaled differently
        [["mamba.out_proj"]],
        [["self_attn.o_proj"]],
        [["feed_forward.gate_proj", "feed_forward.up_proj"]],
        [["feed_forward.down_proj"]],
    ],
    "dots1": [
        [QKV],
        [["self_attn.o_proj"]],
        [["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", "mlp.gate"], ["mlp.experts.gate_up_proj"]],
        [["mlp.experts.down_proj"], ["mlp.shared_experts.down_proj"]],
    ],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_a_block(name: str) -> None:
    work = works(build(name))[-1]
    assert [[short(work, item) for item in group] for group in stages(wanted(work))] == STAGES[name]


def test_listed_experts_share_two_stages() -> None:
    work = works(listed_mixtral())[0]
    found = [[short(work, item) for item in group] for group in stages(wanted(work))]
    experts = "mlp.experts"
    assert found == [
        [QKV],
        [["self_attn.o_proj"]],
        [[f"{experts}.gate.{index}", f"{experts}.up.{index}"] for index in range(4)],
        [[f"{experts}.down.{index}"] for index in range(4)],
    ]


def test_what_the_probe_did_not_reach_comes_last() -> None:
    unreached = Activation("unreached", "other", 8, (), ("c",))
    reached = [Activation("a", "normed", 8, ("norm",), ("a",), 0), Activation("b", "other", 8, (), ("b",), 7)]
    assert stages([unreached, *reached]) == [[reached[0]], [reached[1], unreached]]
    assert stages([unreached]) == [[unreached]]
    assert stages([]) == []


# Rows while the block is being rounded


def rounded_attention(work: BlockWork) -> dict[str, torch.Tensor]:
    """Rounds the block's attention roughly, in the module; its original weights by name."""
    originals = {}
    for name, parameter in work.module.named_parameters():
        if "self_attn" in name and parameter.ndim == 2:
            originals[name] = parameter.data
            parameter.data = (parameter.data * 8).round() / 8
    return originals


def gathered(work: BlockWork, items: list[Activation], originals: dict[str, torch.Tensor]) -> Any:
    """(Gram matrices, drifts) of the activations."""
    grams = {item.label: [Gram(item.width) for _ in range(work.experts(item))] for item in items}
    return grams, gather_drifting(work.calibration, work.block, work.module, items, grams, originals)


def inputs_of(module: nn.Module, work: BlockWork, linear: str) -> torch.Tensor:
    """float64 (M, K): what a linear of a copy of the block multiplies, over the whole set."""
    rows: list[torch.Tensor] = []
    hook = module.get_submodule(linear).register_forward_pre_hook(lambda _, args: rows.append(args[0].clone()))
    with torch.no_grad():
        for batch, call in work.calibration.calls(work.block):
            states = [states for start, states in work.calibration.states() if start == batch.start]
            call.with_hidden(states[0]).run(module)
    hook.remove()
    return torch.cat([part.flatten(0, -2) for part in rows]).double()


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_are_those_of_two_copies_of_the_block(weighted: bool) -> None:
    work = works(build("llama"))[0]
    items = [item for item in wanted(work) if "mlp" in item.label]
    counts = torch.ones(TOKENS.numel(), 1, dtype=torch.float64)
    if weighted:
        found = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(2)) * 2
        work.calibration.weights = {item.label: found for item in items}
        counts = found.reshape(-1, 1).double()
    original = deepcopy(work.module)
    originals = rounded_attention(work)
    rounded = deepcopy(work.module)
    states = torch.cat([states.clone() for _, states in work.calibration.states()])
    grams, drifts = gathered(work, items, originals)
    assert drifts.keys() == {item.label for item in items}
    for item in items:
        linear = short(work, item)[0]
        before, after = inputs_of(original, work, linear), inputs_of(rounded, work, linear)
        gram, drift = after.T @ (counts * after), (before - after).T @ (counts * after)
        assert (before - after).norm() > 0.02 * after.norm()
        torch.testing.assert_close(grams[item.label][0].matrix.double(), gram, rtol=1e-4, atol=1e-4 * float(gram.max()))
        damped = gram + DAMP * gram.diagonal().mean() * torch.eye(item.width)
        correction = drifts[item.label].correction(grams[item.label][0].matrix, DAMP).double()
        torch.testing.assert_close(correction @ damped, drift, rtol=1e-3, atol=1e-3 * float(drift.abs().max()))
    for name, parameter in work.module.named_parameters():
        assert torch.equal(parameter, rounded.get_parameter(name))
    for name, value in originals.items():
        assert torch.equal(value, original.get_parameter(name))
    assert torch.equal(states, torch.cat([states for _, states in work.calibration.states()]))


def test_rows_that_are_not_finite_are_left_out_of_both() -> None:
    """One sample that overflows changes nothing for the others."""
    work = works(build("llama"))[0]
    items = [item for item in wanted(work) if "mlp" in item.label]
    originals = rounded_attention(work)
    kept = torch.ones(len(TOKENS), dtype=torch.bool)
    kept[2] = False
    work.calibration.weights = {item.label: kept[:, None].expand(TOKENS.shape).float() for item in items}
    expected = gathered(work, items, originals)
    work.calibration.weights = {}
    for start, states in work.calibration.states():
        if start == 2:
            states[0] = torch.nan
    found = gathered(work, items, originals)
    for item in items:
        (gram,), (other,) = expected[0][item.label], found[0][item.label]
        assert (other.rows, other.bad_rows) == (3 * TOKENS.shape[1], TOKENS.shape[1])
        torch.testing.assert_close(other.matrix, gram.matrix)
        one, two = (drifts[item.label].correction(gram.matrix, DAMP) for _, drifts in (expected, found))
        assert one.norm() > 0.01
        torch.testing.assert_close(one, two)


def test_experts_in_a_stack_have_no_drift_and_the_original_block_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    work = works(build("mixtral"))[0]
    originals = rounded_attention(work)
    items = [item for item in wanted(work) if "experts" in item.label]
    expected = rows_of(work, items)
    runs: list[None] = []
    run = CalibrationRun._run
    monkeypatch.setattr(CalibrationRun, "_run", lambda *args: (runs.append(None), run(*args))[1])
    grams, drifts = gathered(work, items, originals)
    assert drifts == {}
    assert len(runs) == 2
    assert {(label, index) for label, found in grams.items() for index, gram in enumerate(found) if gram.rows} == {
        *expected
    }
    for (label, expert), rows in expected.items():
        torch.testing.assert_close(grams[label][expert].matrix, rows.T @ rows, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("changed", [False, True])
def test_listed_experts_have_no_drift_however_many_tokens_they_get(changed: bool) -> None:
    """Where the attention is the original one, every expert gets the very rows that it got before."""
    work = works(listed_mixtral())[0]
    items = [item for item in wanted(work) if "mlp" in item.label]
    originals = {name: value.clone() for name, value in rounded_attention(work).items()}
    if not changed:
        originals = {name: work.module.get_parameter(name).data for name in originals}
    counts = {label: len(rows) for (label, _), rows in rows_of(work, items).items()}
    assert all(0 < count < TOKENS.numel() for count in counts.values())
    grams, drifts = gathered(work, items, originals)
    assert drifts == {}
    assert {label: gram.rows for label, (gram,) in grams.items()} == counts


def test_a_model_with_listed_experts_is_corrected_where_it_can_be() -> None:
    for work in works(listed_mixtral()):
        found = {item.label: drift is not None for item, _, drift in rounding(work)}
        assert [label.removeprefix(work.block.name + ".") for label, drifts in found.items() if drifts] == [
            "self_attn.o_proj:in"
        ]
        assert len(found) == 2 + 2 * 4


@pytest.mark.parametrize(("drifts", "rounds"), [(1, 3), (2, 2)])
def test_a_round_leaves_room_for_the_drift(monkeypatch: pytest.MonkeyPatch, drifts: int, rounds: int) -> None:
    """The second of cohere's two stages has two activations: with as much again for drift they fit one round."""
    work = works(build("cohere"))[0]
    monkeypatch.setattr(gather, "STATISTICS_BYTES", drifts * sum(Gram.bytes_for(width) for width in (64, 104)))
    sets: list[None] = []
    gram = work._new_grams
    monkeypatch.setattr(work, "_new_grams", lambda items: (sets.append(None), gram(items))[1])
    assert len(list(rounding(work))) == 3
    assert len(sets) == rounds


def rounding(work: BlockWork) -> Iterator[tuple[Activation, list[Gram], Drift | None]]:
    """The drifting statistics of a block whose weights the pass rounds as they come."""
    quantize = Quantize(QuantizeConfig(correct=0.5))
    for item, grams, drift in work.drifting_statistics():
        quantize._round(work, item, grams, drift)
        yield item, grams, drift


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_from_before_rounding_come_back_for_a_while(family: str) -> None:
    """Behind it the module has what is in `quantized` by then, whichever way round weights are stored."""
    work = works(build(family))[0]
    original = {linear.name: work.original(linear).clone() for linear in work.block.quantized}
    list(rounding(work))
    with work.unrounded():
        for linear in work.block.quantized:
            stored = work.module.get_parameter(weight_name(work.block, linear)).data
            assert torch.equal(stored.transpose(-1, -2) if linear.transposed else stored, original[linear.name])
        for tensor in work.quantized.values():
            tensor.scales *= 1.5
    for linear in work.block.quantized:
        stored = work.module.get_parameter(weight_name(work.block, linear)).data
        expected = work.quantized[linear.name].effective_weight()
        assert torch.equal(stored.transpose(-1, -2) if linear.transposed else stored, expected)
        assert torch.equal(work.original(linear), original[linear.name])


def test_nothing_of_a_batch_is_held_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    work = works(build("llama"))[0]
    originals = rounded_attention(work)
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watching(add: Callable[..., Any]) -> Callable[..., Any]:
        def watched(self: Any, *args: Any) -> Any:
            tensors = [part for arg in args for part in (arg if isinstance(arg, list) else [arg]) if part is not None]
            seen.extend(weakref.ref(tensor) for tensor in tensors)
            return add(self, *args)

        return watched

    def runs(block: Any) -> Iterator[Any]:
        for run in all_runs(block):
            alive.append(sum(ref() is not None for ref in seen))
            yield run

    all_runs = work.calibration.runs
    monkeypatch.setattr(work.calibration, "runs", runs)
    monkeypatch.setattr(Gram, "add", watching(Gram.add))
    monkeypatch.setattr(gather.Drift, "add_all", watching(Drift.add_all))
    gathered(work, [item for item in wanted(work) if "mlp" in item.label], originals)
    assert len(seen) == 2 * 2 * 3  # batches, activations; rows for the Gram matrix, both rows for the drift
    assert alive == [0, 0]
    assert all(ref() is None for ref in seen)
