"""Tiny randomly initialised models of the decoder families of transformers, to parametrize tests over.

    @pytest.mark.parametrize("name", FAMILIES)
    def test_graph(name): model = build(name)

A family is a model type with settings that keep it small but awkward: hidden size 48 to 96, a feed-forward
width that groups of 32 mostly do not divide, and a layer of each kind where a model mixes kinds. All of
them run on a CPU, and give the same logits after save_pretrained and from_pretrained. The names in a saved
file are not always those of the state dict: transformers splits most stacked experts, and leaves out the
head's weight where it is tied. Nothing is read from disk or net, and importing this module builds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Settings = dict[str, Any]
VOCAB = 160
TRAITS = {
    "conv1d": "linears are transformers' Conv1D, weight (K, N)",
    "fused_qkv": "one linear computes query, key and value, in every block",
    "gqa": "fewer key/value heads than query heads",
    "layernorm": "norms subtract the mean",
    "mla": "key and value go through a low-rank bottleneck with a norm in it",
    "moe": "some block routes tokens to experts",
    "parallel": "attention and feed-forward both read the block's input",
    "post_norm": "a norm sits between a linear and the residual add, or on their sum",
    "softcap": "logits go through tanh",
    "ssm": "some block mixes tokens by a recurrence or a convolution instead of attention",
    "stacked_transposed": "stacked expert weights are (E, K, N)",
    "tied": "the head shares the embedding's weight",
}


@dataclass(frozen=True)
class Family:
    """Settings of one tiny model and what is true of it.

    `settings` are keyword arguments of `AutoConfig.for_model(model_type, ...)`, `traits` are keys of
    `TRAITS`. `linears_per_block` counts block 0's weights that a plan may quantize: nn.Linear and Conv1D
    modules and stacked 3-D expert parameters, one each, without routers (linears that score experts, among
    them a shared expert's gate). It is None where blocks differ in that number.
    """

    model_type: str
    settings: Settings
    traits: frozenset[str]
    linears_per_block: int | None


Named = tuple[str, Family]


def _family(model_type: str, linears: int | None, traits: str = "", name: str = "", **settings: Any) -> Named:
    found = frozenset(traits.split())
    if unknown := found - TRAITS.keys():
        raise ValueError(f"{model_type}: unknown traits {sorted(unknown)}, known are {sorted(TRAITS)}")
    common: Settings = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common["tie_word_embeddings"] = "tied" in found
    return name or model_type, Family(model_type, {**common, **settings}, found, linears)


def _llama_like(model_type: str, linears: int | None, traits: str = "", name: str = "", **settings: Any) -> Named:
    """Settings by the names most families share: 4 heads, and 2 key/value heads if traits say "gqa"."""
    shared: Settings = {
        "hidden_size": 64,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if "gqa" in traits.split() else 4,
        "max_position_embeddings": 128,
    }
    return _family(model_type, linears, traits, name, **{**shared, **settings})


def _families() -> Iterator[Named]:
    # dense, RMS norm before attention and feed-forward
    rope: Settings = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    llama3: Settings = {**rope, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn: Settings = {**rope, "rope_type": "yarn"}
    yield _llama_like("llama", 7, "gqa")
    yield _llama_like("mistral", 7, "gqa", intermediate_size=96, head_dim=16, sliding_window=16)
    scaled: Settings = {**yarn, "llama_4_scaling_beta": 0.1}
    yield _llama_like("ministral3", 7, "gqa", hidden_size=48, head_dim=16, rope_parameters=scaled)
    yield _llama_like("qwen2", 7, "gqa tied")
    yield _llama_like("qwen3", 7, "gqa", intermediate_size=96, head_dim=32)
    yield _llama_like("gemma", 7, "gqa tied", head_dim=16)
    yield _llama_like("phi3", 4, "gqa fused_qkv", intermediate_size=96)
    yield _llama_like(
        "granite", 7, "gqa", attention_bias=True, mlp_bias=True,
        embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0,
    )  # fmt: skip
    yield _llama_like("glm", 6, "gqa", head_dim=16, attention_bias=True)
    yield _llama_like(
        "smollm3", 7, "gqa tied", hidden_size=96, num_attention_heads=6, num_hidden_layers=4,
        no_rope_layer_interval=4,
    )  # fmt: skip
    yield _llama_like("helium", 7, head_dim=16)
    yield _llama_like("ernie4_5", 7, "gqa tied", head_dim=16)
    yield _llama_like("hunyuan_v1_dense", 7, "gqa", head_dim=16)
    yield _llama_like("seed_oss", 7, "gqa", head_dim=16)
    yield _llama_like("arcee", 6, "gqa")
    yield _llama_like("apertus", 6, "gqa", rope_parameters=llama3)
    yield _llama_like("diffllama", 7, "gqa")
    yield _llama_like("nanochat", 6, "gqa softcap")
    mla: Settings = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    yield _llama_like("minicpm3", 8, "mla tied", q_lora_rank=40, dim_model_base=32, **mla)
    # dense, RMS norm after attention and feed-forward, or before and after
    mixed: Settings = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    yield _llama_like("gemma2", 7, "gqa tied post_norm softcap", head_dim=16, intermediate_size=96, **mixed)
    yield _llama_like("gemma3_text", 7, "gqa tied post_norm", head_dim=16, **mixed)
    yield _llama_like(
        "gemma4_text", 9, "gqa tied post_norm", head_dim=16, global_head_dim=32,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, **mixed,
    )  # fmt: skip
    shared: Settings = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    shared |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
    yield _llama_like(
        "gemma4_text", None, "gqa tied post_norm", name="gemma4_shared_kv", head_dim=16, global_head_dim=32,
        vocab_size_per_layer_input=VOCAB, **shared,
    )  # fmt: skip
    yield _llama_like(
        "gemma3n_text", None, "gqa tied post_norm softcap", head_dim=16, vocab_size_per_layer_input=VOCAB,
        laurel_rank=8, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0], altup_num_inputs=3, **shared,
    )  # fmt: skip
    yield _llama_like("olmo2", 7, "gqa post_norm", intermediate_size=96)
    yield _llama_like("olmo3", 7, "gqa post_norm", **mixed)
    yield _llama_like("glm4", 6, "gqa post_norm", head_dim=16)
    yield _llama_like("exaone4", 7, "gqa post_norm", **mixed)
    # dense, LayerNorm
    yield _llama_like("phi", 6, "layernorm parallel", partial_rotary_factor=0.5)
    yield _llama_like("stablelm", 7, "layernorm gqa")
    yield _llama_like("olmo", 7, "layernorm gqa", clip_qkv=8.0)
    yield _llama_like("cohere", 7, "layernorm parallel gqa tied", logit_scale=0.5)
    yield _llama_like("cohere2", 7, "layernorm parallel gqa tied", logit_scale=0.5, **mixed)
    yield _llama_like("starcoder2", 6, "layernorm gqa tied", intermediate_size=96, sliding_window=None)
    yield _llama_like("nemotron", 6, "layernorm gqa", head_dim=16)
    yield _llama_like("jais2", 6, "layernorm gqa")
    yield _llama_like("persimmon", 4, "layernorm fused_qkv")
    yield _llama_like("biogpt", 6, "layernorm tied")
    yield _llama_like("gpt_neox", 4, "layernorm parallel fused_qkv")
    gpt: Settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    yield _family("openai-gpt", 4, "layernorm fused_qkv conv1d tied post_norm", **gpt)
    yield _family("gpt2", 4, "layernorm fused_qkv conv1d tied", n_inner=104, **gpt)
    yield _family("gpt_bigcode", 4, "layernorm fused_qkv gqa tied", n_inner=104, multi_query=True, **gpt)
    yield _family("gptj", 6, "layernorm parallel", n_inner=104, rotary_dim=8, **gpt)
    yield _family("codegen", 4, "layernorm parallel fused_qkv", n_inner=104, rotary_dim=8, **gpt)
    yield _family(
        "gpt_neo", 6, "layernorm tied", hidden_size=64, num_layers=2, num_heads=4, intermediate_size=104,
        max_position_embeddings=128, window_size=16, attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    opt: Settings = {"hidden_size": 64, "ffn_dim": 104, "num_hidden_layers": 2, "num_attention_heads": 4}
    yield _family("opt", 6, "layernorm tied", max_position_embeddings=128, word_embed_proj_dim=64, **opt)
    yield _family(
        "opt", 6, "layernorm tied post_norm", name="opt_post_norm", max_position_embeddings=128,
        word_embed_proj_dim=32, do_layer_norm_before=False, **opt,
    )  # fmt: skip
    yield _family(
        "xglm", 6, "layernorm tied", d_model=64, ffn_dim=104, num_layers=2, attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    yield _family("bloom", 4, "layernorm fused_qkv tied", hidden_size=64, n_layer=2, n_head=4)
    yield _family("mpt", 4, "layernorm fused_qkv tied", d_model=64, n_heads=4, n_layers=2, max_seq_len=128)
    falcon: Settings = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_hidden_size": 104,
    }
    yield _family("falcon", 4, "layernorm parallel fused_qkv gqa tied", max_position_embeddings=128, **falcon)
    yield _family(
        "falcon", 4, "layernorm parallel fused_qkv gqa", name="falcon_new", max_position_embeddings=128,
        new_decoder_architecture=True, num_kv_heads=2, **falcon,
    )  # fmt: skip
    # mixture of experts
    local: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
    yield _llama_like("mixtral", 6, "moe gqa", intermediate_size=96, **local)
    yield _llama_like("phimoe", 6, "moe gqa layernorm", **local)
    yield _llama_like("granitemoe", 6, "moe gqa", **local)
    yield _llama_like("granitemoeshared", 8, "moe gqa", shared_intermediate_size=72, **local)
    yield _llama_like("minimax_m2", 6, "moe gqa", head_dim=16, **local)
    yield _llama_like("gpt_oss", 6, "moe gqa stacked_transposed", head_dim=16, rope_parameters=yarn, **mixed, **local)
    yield _llama_like("jetmoe", 5, "moe gqa tied", kv_channels=16, **local)
    yield _llama_like(
        "llama4_text", None, "moe gqa stacked_transposed", head_dim=16, intermediate_size_mlp=72,
        interleave_moe_layer_step=2, no_rope_layer_interval=2, attention_chunk_size=16,
        num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    experts: Settings = {"num_experts": 4, "num_experts_per_tok": 2}
    yield _llama_like("olmoe", 6, "moe", **experts)
    yield _llama_like("flex_olmo", 6, "moe gqa post_norm", **experts)
    experts["moe_intermediate_size"] = 40
    yield _llama_like("qwen2_moe", 9, "moe gqa", shared_expert_intermediate_size=72, **experts)
    yield _llama_like("qwen3_moe", 6, "moe gqa", head_dim=16, **experts)
    yield _llama_like("hunyuan_v1_moe", 9, "moe gqa", head_dim=16, num_experts=4, moe_topk=2)
    yield _llama_like(
        "ernie4_5_moe", None, "moe gqa tied", moe_num_experts=4, moe_k=2, moe_intermediate_size=40,
        moe_num_shared_experts=1, moe_layer_start_index=1,
    )  # fmt: skip
    routed: Settings = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    routed |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    yield _llama_like("deepseek_v2", None, "moe mla", q_lora_rank=None, head_dim=8, **mla, **routed)
    yield _llama_like("deepseek_v3", None, "moe mla", q_lora_rank=40, **mla, **routed)
    yield _llama_like(
        "deepseek_v32", None, "moe mla", q_lora_rank=40, index_n_heads=2, index_head_dim=16, index_topk=8,
        **mla, **routed,
    )  # fmt: skip
    yield _llama_like("glm4_moe", None, "moe gqa", head_dim=16, **routed)
    yield _llama_like("dots1", None, "moe gqa", head_dim=16, **routed)
    # recurrences and convolutions, alone or mixed with attention
    yield _family("mamba", 4, "ssm tied", hidden_size=64, state_size=8, num_hidden_layers=2)
    yield _family("falcon_mamba", 4, "ssm tied", hidden_size=64, state_size=8, num_hidden_layers=2)
    yield _family(
        "mamba2", 2, "ssm", hidden_size=64, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=16,
        n_groups=2, chunk_size=8,
    )  # fmt: skip
    yield _llama_like(
        "jamba", None, "ssm moe gqa", num_hidden_layers=4, attn_layer_period=4, attn_layer_offset=2,
        num_experts=4, num_experts_per_tok=2, mamba_d_state=8, mamba_dt_rank=6,
    )  # fmt: skip
    heads: Settings = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    yield _llama_like("bamba", None, "ssm gqa", attn_layer_indices=[1], **heads)
    yield _llama_like(
        "granitemoehybrid", None, "ssm moe gqa", layer_types=["mamba", "attention"],
        shared_intermediate_size=72, **heads, **local,
    )  # fmt: skip
    yield _llama_like("falcon_h1", 9, "ssm gqa", head_dim=16, mamba_d_ssm=128, **heads)
    yield _llama_like(
        "zamba2", None, "ssm tied", num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=8, n_mamba_heads=8, chunk_size=8, adapter_rank=8,
    )  # fmt: skip
    yield _llama_like(
        "recurrent_gemma", None, "ssm gqa tied softcap", num_hidden_layers=3, attention_window_size=16
    )  # fmt: skip
    conv: Settings = {"layer_types": ["conv", "full_attention"]}
    yield _llama_like("lfm2", None, "ssm gqa tied", block_auto_adjust_ff_dim=False, **conv)
    yield _llama_like("lfm2_moe", None, "ssm moe gqa tied", num_dense_layers=1, **conv, **experts)
    yield _llama_like("minimax", None, "ssm moe gqa post_norm", head_dim=16, block_size=8, **local)
    delta: Settings = {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_num_value_heads": 4}
    delta |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    yield _llama_like("qwen3_5_text", None, "ssm gqa", head_dim=16, **delta)
    yield _llama_like(
        "qwen3_next", None, "ssm moe gqa", head_dim=16, shared_expert_intermediate_size=72, **delta, **experts
    )  # fmt: skip
    yield _llama_like("olmo_hybrid", None, "ssm gqa post_norm", **delta)


FAMILIES: dict[str, Family] = dict(_families())


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The family's model in float32 and eval mode, the same for the same seed.

    Noise is added to every parameter: weights wide enough that logits depend on the input, norm weights
    around 1 (or around 0 where the norm adds 1) and biases not 0, so that a rewrite which forgets one
    of them shows. The global random state is left as it was.
    """
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.model_type, **family.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        randomize(model)
    return model


def randomize(model: PreTrainedModel) -> None:
    """Add noise to every parameter, from the global random state: wide for weights, little for norms and biases."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for param_name, param in model.named_parameters():
            norm = param.ndim == 1 and param_name.endswith("weight")
            std = 0.3 if id(param) in embeddings else 0.2 if norm else 0.1
            param.add_(torch.randn_like(param), alpha=std)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("correction_bias"):  # a router's, trained though no parameter
                buffer.add_(torch.randn_like(buffer), alpha=0.1)
