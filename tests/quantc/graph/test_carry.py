"""What blocks hand on besides one hidden state: kept with it, run with it, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantc.calibration import stream
from quantc.calibration.stream import CalibrationRun
from quantc.errors import ModelError
from quantc.graph.carry import Carry, Entry, Piece
from quantc.graph.derive import derive
from quantc.pipeline.run import output_logits
from tests.families import VOCAB, build
from tests.helpers import block_works, in_memory_run
from tests.quantc.graph.test_rewrite import CHANGED, random_scales

TOKENS = torch.randint(0, VOCAB, (5, 24), generator=torch.Generator().manual_seed(4))
FAMILIES = ["gemma4_shared_kv", "gemma3n_text"]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_one_by_one_compute_what_the_model_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_TOKENS", 2 * TOKENS.shape[1])  # three batches
    model = build(name)
    run = in_memory_run(model)
    states = CalibrationRun(model, run.graph, TOKENS, run.device, exact=True)
    for block in run.graph.blocks:
        states.advance(block)
    with torch.no_grad():
        found = torch.cat([
            output_logits(run, TOKENS[start : start + len(rows)], rows) for start, rows in states.states()
        ])  # fmt: skip
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_go_back_through_what_is_handed_on(name: str) -> None:
    """Block by block, as a backward sweep goes, the gradient at the first block is that of the whole chain."""
    run = in_memory_run(build(name))
    works = list(block_works(run, TOKENS))
    states = works[0].calibration
    (batch,) = states.batches

    def step(index: int, state: torch.Tensor) -> torch.Tensor:
        call = states.call(works[index].block, batch).with_hidden(state)
        return works[index].block.returns.unwrap(call.run(works[index].module), call)

    inputs = [states.hidden(batch).requires_grad_()]
    with torch.enable_grad():
        whole = inputs[0]
        for index in range(len(works)):
            whole = step(index, whole)
    carry = works[0].block.returns.carry
    assert carry is not None
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(5))
    upstream[..., carry.hidden.columns :] = 0  # nothing behind the last block reads them
    (expected,) = torch.autograd.grad(whole, inputs[0], upstream)
    with torch.no_grad():
        for index in range(len(works) - 1):
            inputs.append(step(index, inputs[-1]))
    gradient = upstream
    for index in reversed(range(len(works))):
        leaf = inputs[index].detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(step(index, leaf), leaf, gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_fold_that_later_blocks_would_see_is_refused() -> None:
    """Without a norm between them, scales of values fold into o: but not where later blocks read these values."""
    model = build("gemma4_shared_kv").double()
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "v_norm"):
            layer.self_attn.v_norm = nn.Identity()
    expected = logits(model)
    found = {}
    for work in block_works(in_memory_run(model), TOKENS):
        for item in work.block.activations:
            if item.kind == "value":
                found[work.block.index] = work.divide(item, random_scales(item))
    assert found == {0: CHANGED, 1: CHANGED, 2: "no single linear writes it", 3: "no single linear writes it"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_rows_hold_what_is_there_and_zeros_for_the_rest() -> None:
    hidden = torch.randn(3, 2, 5, 4)  # streams, samples, tokens, width
    keys = torch.randn(2, 6, 5, 7)  # samples, heads, tokens, channels
    entries = (Entry((0, "a"), (Piece((0, 2), (6, 7)),), None), Entry((0, "b"), (Piece((0, 2), (6, 7)),) * 2, tuple))
    before, behind = (Carry(Piece((1, 2), (3, 4)), entries, present) for present in (1, 2))
    rows = before.pack(hidden, {0: {"a": keys}})
    assert rows.shape == (2, 5, 3 * 4 + 3 * 42)
    assert torch.equal(rows[1, 4, :12], hidden[:, 1, 4].flatten())
    assert not rows[..., 12 + 42 :].any()
    assert torch.equal(before.hidden_of(rows), hidden)
    given: dict[str, Any] = {}
    filled = before.restore(rows, {0: given, 1: "else"})
    assert list(filled[0]) == ["a"]
    assert torch.equal(filled[0]["a"], keys)
    assert filled[1] == "else"
    assert given == {}
    both = behind.restore(behind.pack(hidden, {0: {"a": keys, "b": (keys + 1, keys + 2)}}), {0: given})
    assert torch.equal(both[0]["b"][1], keys + 2)
    assert type(both[0]["b"]) is tuple


def test_entries_of_a_list_come_back_in_order() -> None:
    entries = tuple(Entry(("past", at), (Piece((0, 1), (4,)),), None) for at in range(2))
    carry = Carry(Piece((0, 1), (4,)), entries, 2)
    left = [torch.ones(2, 3, 4), 2 * torch.ones(2, 3, 4)]
    rows = carry.pack(torch.zeros(2, 3, 4), {"past": left})
    found = carry.restore(rows, {"past": []})["past"]
    assert all(torch.equal(one, other) for one, other in zip(found, left, strict=True))


class Handing(nn.Module):
    """A model of three linear blocks; `block(self, index, hidden, state)` is what one of them does."""

    def __init__(self, block: Callable[..., Any], state: Any, passes: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB, bias=False)
        self.blocks = nn.ModuleList([Member(block, index) for index in range(3)])
        self.state, self.passes = state, passes
        self.all_tied_weights_keys: dict[str, str] = {}

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden, state = self.embed(input_ids), self.state
        for block in self.blocks:
            output = block(hidden, state)
            hidden, state = output if self.passes else (output, state)
        return self.head(hidden)


class Member(nn.Module):
    def __init__(self, block: Callable[..., Any], index: int) -> None:
        super().__init__()
        self.linear, self.block, self.index = nn.Linear(4, 4), block, index

    def forward(self, hidden: torch.Tensor, state: Any) -> Any:
        return self.block(self, self.index, hidden, state)


class Box:
    kept: torch.Tensor | None = None


def into_a_box(member: Member, index: int, hidden: torch.Tensor, state: Box) -> torch.Tensor:
    state.kept = member.linear(hidden)
    return hidden + state.kept


def whole_numbers(member: Member, index: int, hidden: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    state["top"] = hidden.topk(2).indices
    return hidden + member.linear(hidden)


def in_place(member: Member, index: int, hidden: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state += 1
    return hidden + member.linear(hidden)


def pooled(member: Member, index: int, hidden: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    state["mean"] = hidden.mean(1)
    return hidden + member.linear(hidden)


def returned(member: Member, index: int, hidden: torch.Tensor, state: Any) -> Any:
    return hidden + member.linear(hidden), member.linear(hidden).sum(-1)


def missing(member: Member, index: int, hidden: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    return hidden + member.linear(state["nobody"])


FOLLOWED = "which later blocks may read; quantc can only follow float tensors that blocks put into a mapping or a list."
REFUSED = {
    "box": (into_a_box, Box, False, f"a block changes a Tensor in its argument 1, {FOLLOWED}"),
    "integers": (whole_numbers, dict, False, f"a block changes a Tensor in its argument 1, {FOLLOWED}"),
    "in place": (in_place, lambda: torch.ones(1), False, f"a block changes a Tensor in its argument 1, {FOLLOWED}"),
    "pooled": (
        pooled, dict, False,
        "blocks hand on a tensor of shape (2, 4) for 2 samples of 24 tokens; quantc needs one row for each token of "
        "each sample.",
    ),
    "returned": (
        returned, lambda: None, True,
        "a block receives in its argument 1 what an earlier one returned beside the hidden state; quantc can only run "
        "blocks that hand on one hidden state.",
    ),
    "missing": (
        missing, dict, False,
        "Handing failed on tokens alone (KeyError: 'nobody'); quantc needs a decoder that runs on input_ids.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_handed_on_is_refused(case: str) -> None:
    block, state, passes, message = REFUSED[case]
    model: Any = Handing(block, state(), passes)
    with pytest.raises(ModelError) as caught:
        derive(model, lambda _: None, lambda _: None)
    assert str(caught.value) == message


def each_leaves_one(member: Member, index: int, hidden: torch.Tensor, state: list[torch.Tensor]) -> torch.Tensor:
    state.append(member.linear(hidden))
    return hidden + sum(state)


def test_every_block_of_a_kind_that_leaves_something_is_run() -> None:
    class Fresh(Handing):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            self.state = []
            return super().forward(input_ids, use_cache)

    model: Any = Fresh(each_leaves_one, [])
    read: list[str] = []
    graph = derive(model, read.append, lambda _: None)
    assert [name for name in read if name.startswith("blocks")] == ["blocks.0", "blocks.1", "blocks.2"] * 2
    carries = [block.returns.carry for block in graph.blocks]
    assert [carry and (len(carry.entries), carry.present) for carry in carries] == [(3, 0), (3, 1), (3, 2)]
    states = CalibrationRun(model, graph, TOKENS, torch.device("cpu"), exact=True)
    for block in graph.blocks:
        states.advance(block)
    (batch,) = states.batches
    with torch.no_grad():
        found = model.head(states.hidden(batch)[..., :4])
        torch.testing.assert_close(found, model(TOKENS, use_cache=False))


def no_memory(member: Member, index: int, hidden: torch.Tensor, state: Any) -> torch.Tensor:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def test_memory_that_runs_out_is_not_taken_for_the_model_s_fault() -> None:
    model: Any = Handing(no_memory, None)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        derive(model, lambda _: None, lambda _: None)
