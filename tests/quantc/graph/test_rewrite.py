"""Exact rewrites: which activations fold in every family, that they change nothing, and that wrong ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantc.graph.model_graph import Activation
from quantc.graph.rewrite import Edits, Refusal, fold_scales, powers_of_two, weight_name
from quantc.graph.tracer import ROUTES
from quantc.pipeline import work as handed
from quantc.pipeline.work import BlockWork
from tests.families import FAMILIES, VOCAB, build
from tests.helpers import block_works, in_memory_run

PROBE, OTHER = torch.randint(0, VOCAB, (2, 2, 20), generator=torch.Generator().manual_seed(1))
KINDS = ("normed", "gated", "value")

CHANGED = "the block's output changed on the probe"
FUSED = "the linear that writes it writes something else too"
NO_WRITER = "no single linear writes it"
NO_GAIN = "its norm has no plain gain"
SHARED = "another block shares its weights"

# (normed, gated, value): how many of each kind the whole model folds -> families. What reads a norm counts once for
# each tensor: two where attention and feed-forward share one. Attention that is not torch's own function (soft caps,
# sinks, recurrences) has no "value", and feed-forwards without a plain gate have no "gated".
FOLDED = {
    (0, 0, 0): "openai-gpt jetmoe",
    (0, 0, 1): "minimax",
    (0, 0, 2): "nanochat opt_post_norm flex_olmo",
    (0, 2, 0): "olmo",
    (0, 2, 2): "olmo2 olmo3 exaone4",
    (2, 0, 0): "gptj codegen falcon gpt_oss mamba falcon_mamba mamba2",
    (2, 0, 1): "granitemoehybrid",
    (2, 0, 2): "phi mixtral phimoe granitemoe granitemoeshared minimax_m2 olmoe qwen3_moe",
    (2, 2, 0): "qwen3_next",
    (2, 2, 1): "olmo_hybrid",
    (2, 2, 2): "cohere cohere2 qwen2_moe hunyuan_v1_moe falcon_h1",
    (3, 1, 1): "lfm2_moe",
    (3, 2, 2): "llama4_text ernie4_5_moe glm4_moe dots1",
    (4, 0, 0): "phi3 persimmon gpt_neox gpt2 gpt_bigcode gpt_neo xglm bloom mpt falcon_new zamba2",
    (4, 0, 2): "glm arcee apertus glm4 starcoder2 nemotron jais2 biogpt opt",
    (4, 2, 0): "diffllama gemma2 gemma4_text gemma3n_text qwen3_5_text",
    (4, 2, 1): "bamba lfm2",
    (
        4,
        2,
        2,
    ): "llama mistral ministral3 qwen2 qwen3 gemma granite helium ernie4_5 hunyuan_v1_dense seed_oss gemma3_text "
    "stablelm",
    (5, 2, 0): "deepseek_v2",
    (6, 2, 1): "jamba",
    (6, 3, 1): "recurrent_gemma",
    (7, 2, 0): "deepseek_v3 deepseek_v32",
    (8, 2, 0): "minicpm3",
    (8, 4, 0): "gemma4_shared_kv",
    (8, 4, 4): "smollm3",
}
EXPECTED = {name: counts for counts, names in FOLDED.items() for name in names.split()}

# Activations (by their first reader) that are of a foldable kind and stay as they are, in every block that has them.
REFUSED: dict[str, dict[str, str]] = {
    # gate and up, or q, k and v, are rows of one linear
    "phi3": {"self_attn.o_proj": FUSED, "mlp.down_proj": NO_WRITER},
    "glm": {"mlp.down_proj": NO_WRITER},
    "glm4": {"mlp.down_proj": NO_WRITER},
    "persimmon": {"self_attn.dense": FUSED},
    "gpt_neox": {"attention.dense": FUSED},
    "gpt2": {"attn.c_proj": FUSED},
    "gpt_bigcode": {"attn.c_proj": FUSED},
    "falcon": {"self_attention.dense": FUSED},
    "falcon_new": {"self_attention.dense": NO_WRITER},
    # one linear writes the keys' and the values' parts out of the bottleneck
    "minicpm3": {"self_attn.o_proj": FUSED},
    # norms without a gain; values are clipped to +-8
    "diffllama": {"self_attn.o_proj": NO_GAIN},
    "nanochat": {"self_attn.q_proj": NO_GAIN, "mlp.fc1": NO_GAIN},
    "olmo": {"self_attn.q_proj": NO_GAIN, "mlp.gate_proj": NO_GAIN, "self_attn.o_proj": NO_WRITER},
    # a norm stands between v and attention
    "gemma4_text": {"self_attn.o_proj": NO_WRITER},
    "gemma4_shared_kv": {"self_attn.o_proj": NO_WRITER},
    # a norm's output goes on beside attention, too
    "gemma3n_text": {"self_attn.q_proj": CHANGED, "self_attn.o_proj": NO_WRITER},
    # attention's output is gated
    "qwen3_5_text": {"self_attn.o_proj": NO_WRITER},
    # the norm's output goes on as the residual stream
    "openai-gpt": {"mlp.c_fc": CHANGED},
    "opt_post_norm": {"fc1": CHANGED},
    "minimax": {"self_attn.q_proj": CHANGED, "self_attn.qkv_proj": CHANGED, "self_attn.out_proj": NO_WRITER},
    # recurrence and attention read one norm, each times a number of its own
    "falcon_h1": {"mamba.in_proj": CHANGED, "self_attn.q_proj": CHANGED},
    # stacked experts read it too, some behind a router of their own
    "granitemoeshared": {"shared_mlp.input_linear": CHANGED, "shared_mlp.output_linear": NO_WRITER},
    "granitemoehybrid": {"shared_mlp.input_linear": CHANGED, "shared_mlp.output_linear": NO_WRITER},
    "jetmoe": {"self_attention.experts.router.layer": CHANGED},
    "llama4_text": {"feed_forward.shared_expert.gate_proj": CHANGED},
    "qwen2_moe": {"mlp.shared_expert.gate_proj": CHANGED},
    "qwen3_next": {"mlp.shared_expert.gate_proj": CHANGED, "self_attn.o_proj": NO_WRITER},
    "hunyuan_v1_moe": {"mlp.gate.wg": CHANGED},
    "ernie4_5_moe": {"mlp.shared_experts.gate_proj": CHANGED},
    "glm4_moe": {"mlp.shared_experts.gate_proj": CHANGED},
    "dots1": {"mlp.shared_experts.gate_proj": CHANGED},
    "deepseek_v2": {"mlp.shared_experts.gate_proj": CHANGED, "self_attn.o_proj": FUSED},
    "deepseek_v3": {"mlp.shared_experts.gate_proj": CHANGED, "self_attn.o_proj": FUSED},
    "deepseek_v32": {"mlp.shared_experts.gate_proj": CHANGED, "self_attn.o_proj": FUSED},
    # its attention is one module in several blocks
    "zamba2": {
        f"shared_transformer.{reader}": SHARED
        for reader in ("self_attn.q_proj", "self_attn.o_proj", "feed_forward.gate_up_proj")
    },
}
ROUTERS = {ROUTES, "no linear holds it"}  # why linears stay as they are that score experts
DELTA_RULE = {"qwen3_5_text", "qwen3_next", "olmo_hybrid"}
NOT_IN_FLOAT64 = {"xglm"}  # its mask is cast from float32's least value


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=OTHER, use_cache=False).logits.double()


def random_scales(item: Activation, seed: int = 0) -> torch.Tensor:
    return torch.randn(item.width, generator=torch.Generator().manual_seed(seed + item.width)).exp()


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_random_scales_fold_into_every_family_and_leave_its_logits(name: str) -> None:
    model = build(name) if name in NOT_IN_FLOAT64 else build(name).double()
    run = in_memory_run(model)
    expected = logits(model)
    folded, refused = dict.fromkeys(KINDS, 0), {}
    for work in block_works(run, PROBE):
        for item in work.block.activations:
            keeps = {linear.keep for linear in work.block.linears if linear.name in item.readers}
            if item.kind not in KINDS or keeps <= ROUTERS:
                continue
            before = parameters(work.module)
            reason = work.divide(item, random_scales(item))
            changed = {key for key, value in work.module.named_parameters() if not torch.equal(value, before[key])}
            if reason:
                refused[item.readers[0].removeprefix(work.block.name + ".")] = reason
                assert not changed
            else:
                folded[item.kind] += 1
                assert len(changed) >= 1 + len(item.readers)
    assert tuple(folded.values()) == EXPECTED[name]
    assert refused == REFUSED.get(name, {})
    # Norms and softmax cast to float32; layers of the delta rule do so for every token, on top of the one before.
    bound = torch.finfo(torch.float32).eps * expected.shape[1] if name in DELTA_RULE else 1e-6
    assert (logits(model) - expected).abs().max() <= bound * expected.abs().max()


# Wrong folds. `kind` picks an activation of the first block, `spoil` what goes wrong.

Spoil = Callable[[BlockWork, Activation, torch.Tensor, Edits], None]


def first_work(name: str, **options: Any) -> BlockWork:
    return next(block_works(in_memory_run(build(name).double(), **options), PROBE))


def pick(work: BlockWork, kind: str) -> Activation:
    return next(item for item in work.block.activations if item.kind == kind)


def readers_of(work: BlockWork, item: Activation) -> list[str]:
    return [weight_name(work.block, linear) for linear in work.block.linears if linear.reads == item.label]


def leave_out_a_reader(work: BlockWork, item: Activation, scales: torch.Tensor, edits: Edits) -> None:
    del edits[readers_of(work, item)[-1]]


def leave_out_the_writer(work: BlockWork, item: Activation, scales: torch.Tensor, edits: Edits) -> None:
    for name in set(edits) - set(readers_of(work, item)):
        del edits[name]


def scale_one_channel_wrongly(work: BlockWork, item: Activation, scales: torch.Tensor, edits: Edits) -> None:
    linear = next(linear for linear in work.block.linears if linear.reads == item.label)
    weight = edits[weight_name(work.block, linear)]
    (weight if linear.transposed else weight.T)[5] *= 1.01


def scale_each_query_head_by_its_own(work: BlockWork, item: Activation, scales: torch.Tensor, edits: Edits) -> None:
    (name,) = readers_of(work, item)
    edits[name] = work.module.get_parameter(name).double() * scales


WRONG: list[tuple[str, str, Spoil]] = [
    (family, kind, spoil)
    for family, kind in (("llama", "normed"), ("llama", "gated"), ("llama", "value"), ("gpt2", "normed"))
    for spoil in (leave_out_a_reader, leave_out_the_writer, scale_one_channel_wrongly)
]
WRONG += [("llama", "value", scale_each_query_head_by_its_own), ("gemma3_text", "normed", scale_one_channel_wrongly)]


@pytest.mark.parametrize(("family", "kind", "spoil"), WRONG)
def test_a_wrong_fold_is_refused_and_changes_nothing(
    family: str, kind: str, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = first_work(family)
    item = pick(work, kind)
    before = parameters(work.module)

    def spoiled(*args: Any) -> tuple[Edits, torch.Tensor]:
        edits, used = fold_scales(*args)
        spoil(work, item, args[3], edits)
        return edits, used

    monkeypatch.setattr(handed, "fold_scales", spoiled)
    assert work.divide(item, random_scales(item)) == CHANGED
    assert all(torch.equal(value, before[name]) for name, value in work.module.named_parameters())
    monkeypatch.undo()
    assert work.divide(item, random_scales(item)) == ""  # it was the mistake that was refused


@pytest.mark.parametrize(("kind", "owner"), [("normed", "self_attn.q_proj"), ("gated", "mlp"), ("value", "self_attn")])
def test_a_reader_that_the_graph_does_not_know_is_noticed(kind: str, owner: str) -> None:
    work = first_work("llama")
    item = pick(work, kind)
    before = parameters(work.module)
    reader = work.module.get_submodule(item.readers[0].removeprefix(work.block.name + "."))
    read: list[torch.Tensor] = []
    reader.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    width = work.run.graph.linears[item.readers[0]].shape[0]
    reader.register_forward_hook(lambda _, __, output: output + 0.01 * read[-1][..., :width])
    assert work.divide(item, random_scales(item)) == CHANGED
    assert all(torch.equal(value, before[name]) for name, value in work.module.named_parameters())


# Stored dtypes


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma", "cohere", "gpt2"])
def test_what_a_fold_writes_into_a_norm_is_stored_without_rounding(family: str, stored: torch.dtype) -> None:
    work = next(block_works(in_memory_run(build(family).to(stored).double(), stored), PROBE))
    for item in work.block.activations:
        if item.kind == "normed":
            edits, used = fold_scales(work.block, work.module, item, random_scales(item), stored)
            norm = item.writers[0].removeprefix(work.block.name + ".")
            written = {name: value for name, value in edits.items() if name.startswith(norm + ".")}
            assert written
            assert all(torch.equal(value.to(stored).double(), value) for value in written.values())
            assert (used > 0).all()
            assert work.divide(item, random_scales(item)) == ""


def test_the_scales_used_are_the_nearest_that_a_norm_can_store() -> None:
    work = first_work("llama", stored=torch.bfloat16)
    item = pick(work, "normed")
    wanted = random_scales(item).double()
    used = work.usable_scales(item, wanted)
    assert ((used / wanted - 1).abs() <= 2.0**-8).all()
    assert not torch.equal(used, wanted)
    assert torch.allclose(work.usable_scales(item, used), used, rtol=1e-12, atol=0)


def test_a_bias_is_divided_by_powers_of_two() -> None:
    for family, kind in (("gpt2", "normed"), ("qwen2", "value")):
        work = first_work(family)
        item = pick(work, kind)
        used = work.usable_scales(item, random_scales(item))
        assert torch.equal(used, powers_of_two(used))
        assert used.unique().numel() > 2
    assert powers_of_two(torch.tensor([1.4, 1.5, 0.7, 0.72])).tolist() == [1.0, 2.0, 0.5, 1.0]


def test_a_bias_that_would_be_rounded_is_a_refusal() -> None:
    """nemotron multiplies by one plus its gain, so that a storable gain does not leave a power of two."""
    work = first_work("nemotron", stored=torch.bfloat16)
    item = pick(work, "normed")
    assert work.divide(item, random_scales(item)) == "its norm's bias would be rounded"
    with pytest.raises(Refusal, match="its norm's bias would be rounded"):
        work.usable_scales(item, random_scales(item))


def test_a_channel_whose_gain_is_zero_is_left_alone() -> None:
    model = build("llama").double()
    model.model.layers[0].input_layernorm.weight.data[3] = 0.0
    work = next(block_works(in_memory_run(model), PROBE))
    item = pick(work, "normed")
    used = work.usable_scales(item, random_scales(item))
    assert used[3] == 1
    assert work.divide(item, random_scales(item)) == ""


def test_query_heads_of_a_value_head_share_the_geometric_mean() -> None:
    work = first_work("llama")  # 4 query heads of 16 channels, 2 value heads
    item = pick(work, "value")
    wanted = random_scales(item).double()
    used = work.usable_scales(item, wanted).reshape(2, 2, 16)
    assert torch.equal(used[:, 0], used[:, 1])
    torch.testing.assert_close(used[:, 0], wanted.reshape(2, 2, 16).prod(1).sqrt())


def test_values_that_are_clipped_are_not_proportional_to_their_linear() -> None:
    """Dividing v would move what a clip cuts off, whether or not it cuts anything on the probe."""
    for family, scaled_by in (("olmo", 0), ("llama", 1)):
        assert len(pick(first_work(family), "value").scaled_by) == scaled_by
