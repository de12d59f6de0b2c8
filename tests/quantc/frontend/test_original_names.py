"""Names that tensors have in published checkpoints: those that transformers saves a model under."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantc.frontend.original_names import OriginalNames
from tests.families import FAMILIES
from tests.helpers import thinned

STACKED = [
    "mixtral", "qwen3_moe", "phimoe", "minimax_m2", "gpt_oss", "llama4_text", "olmoe", "qwen2_moe", "deepseek_v3",
    "lfm2_moe", "granitemoe", "jetmoe", "qwen3_next",
]  # fmt: skip


def tiny(family: str) -> PreTrainedModel:
    config = AutoConfig.for_model(FAMILIES[family].model_type, **FAMILIES[family].settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", thinned([*STACKED, "llama", "gemma3_text", "falcon", "mamba2"], every=3))
def test_a_model_is_named_as_transformers_saves_it(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    saved, names = load_file(file), OriginalNames(model)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            found |= names.restored(name, tensor)
    assert set(found) == set(saved)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_experts_are_rows_of_their_stack() -> None:
    model = tiny("mixtral")
    stack = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
    count, rows, _ = stack.shape
    found = OriginalNames(model).experts("model.layers.0.mlp.experts.gate_up_proj", count, rows, transposed=False)
    assert found is not None
    assert [each.expert for each in found] == [*range(count), *range(count)]
    parts = OriginalNames(model).restored("model.layers.0.mlp.experts.gate_up_proj", stack)
    for each in found:
        assert torch.equal(parts[f"{each.name}.weight"], stack[each.expert, each.rows])
    assert found[0].name == "model.layers.0.block_sparse_moe.experts.0.w1"
    assert found[-1].name == f"model.layers.0.block_sparse_moe.experts.{count - 1}.w3"


def test_what_transformers_cannot_undo_keeps_its_name() -> None:
    names, name = OriginalNames(tiny("mixtral")), "model.layers.0.mlp.experts.gate_up_proj"
    odd = torch.zeros(4, 1, 6)  # has no halves
    assert set(names.restored(name, odd)) == {name}
    assert names.experts(name, 4, 1, transposed=False) is None


def test_experts_without_names_of_their_own_have_none() -> None:
    model = tiny("gpt_oss")
    stack = model.state_dict()["model.layers.0.mlp.experts.gate_up_proj"]
    found = OriginalNames(model).experts("model.layers.0.mlp.experts.gate_up_proj", len(stack), stack.shape[2], True)
    assert found is None
