"""LoRA by peft on packed models: the gradients of the float model, and nothing of the weights is changed or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import quantc
from quantc.errors import CheckpointError, UsageError
from quantc.runtime.modules import unpack
from quantc.runtime.tables import unpack_tables
from tests.families import build
from tests.helpers import run_forked, save_with_tokenizer

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

TOKENS = torch.tensor([[3, 17, 42, 99, 3, 7, 120, 64]])
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: llama, its embedding and head too; rotated, its hidden states too; gpt2 and qwen2_moe."""
    folder = tmp_path_factory.mktemp("adapters")
    save_with_tokenizer(build("llama"), folder / "model")
    text: dict[str, Any] = {"calib": str(folder / "model/text.txt"), "samples": 4, "seq_len": 32}
    quantize = quantc.quantize
    quantize(folder / "model", bits=4, head_bits=8, group_size=32, method="rtn", out=folder / "llama")
    quantize(folder / "model", bits=3, group_size=32, preset="balanced", out=folder / "rotated", **text)
    for name in ("gpt2", "qwen2_moe"):
        save_with_tokenizer(build(name), folder / f"{name}-float")
        quantize(folder / f"{name}-float", bits=4, group_size=32, method="rtn", out=folder / name)
    return folder


def with_adapter(model: PreTrainedModel, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": LINEARS, "init_lora_weights": False, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def loaded(folder: Path) -> PreTrainedModel:
    return quantc.load(folder, dtype=torch.float32)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """At every adapter, and at the hidden states that enter the blocks."""
    found = {}

    def keep(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        output.requires_grad_().register_hook(lambda gradient: found.update(inputs=gradient))

    with torch.enable_grad():
        hook = model.get_input_embeddings().register_forward_hook(keep)
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    hook.remove()
    return found | {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("name", ["llama", "rotated"])
def test_gradients_are_those_of_the_float_model(folder: Path, name: str) -> None:
    packed = with_adapter(loaded(folder / name))
    floats = with_adapter(unpack(loaded(folder / name), torch.float32))
    assert {type(module).__name__ for key, module in packed.named_modules() if key.endswith("_proj")} == {"PackedLora"}
    found, expected = gradients(packed), gradients(floats)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * len(LINEARS) * packed.config.num_hidden_layers + 1
    for key, gradient in expected.items():
        assert float(gradient.abs().max()) > 0, key
        assert torch.allclose(found[key], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), key


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", "all-linear"), ("gpt2", ["c_attn"]), ("qwen2_moe", ["q_proj"])]
)
def test_a_few_steps_lower_the_loss_and_the_adapter_loads_again(
    folder: Path, tmp_path: Path, name: str, targets: Any
) -> None:
    model = with_adapter(loaded(folder / name), target_modules=targets, init_lora_weights=True)
    before = {key: buffer.clone() for key, buffer in model.get_base_model().named_buffers()}
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(buffer, before[key]) for key, buffer in model.get_base_model().named_buffers())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(loaded(folder / name), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


def test_all_linear_leaves_the_head_alone(folder: Path) -> None:
    model = with_adapter(loaded(folder / "llama"), target_modules="all-linear")
    names = {key.rpartition(".")[2] for key, module in model.named_modules() if type(module).__name__ == "PackedLora"}
    assert names == set(LINEARS)


def test_an_adapter_follows_the_codes_and_the_dtype(folder: Path) -> None:
    model = quantc.load(folder / "llama", dtype=torch.bfloat16)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    weight = model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert weight.device.type == "cpu"
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_gradients_are_recomputed_where_activations_are_not_kept(folder: Path) -> None:
    model = peft.prepare_model_for_kbit_training(loaded(folder / "llama"))
    found = gradients(with_adapter(model, target_modules=["q_proj"]).train())
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())


def test_merging_into_codes_is_refused_and_into_floats_done(folder: Path) -> None:
    model = with_adapter(loaded(folder / "rotated")).eval()
    with pytest.raises(UsageError, match=r"cannot be merged into weights in w3g32.*which would round it away; load it"):
        model.merge_and_unload()
    with torch.no_grad():
        expected = model(TOKENS).logits
        unpack(model, torch.float32)
        merged = model.merge_and_unload()
        assert type(merged.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_adapters_of_tables_train_but_are_not_merged(folder: Path, name: str) -> None:
    model = with_adapter(loaded(folder / "llama"), target_modules=[name], init_lora_weights=True)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert any(each.grad is not None and float(each.grad.abs().max()) > 0 for each in model.parameters())
    with pytest.raises(CheckpointError, match="the values of a packed weight are read or written directly"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"variant of LoRA \(.*use_dora.*\), but packed linears take plain LoRA only; leave"),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights is 'olora', which changes the weight, and this one is packed",
        ),
        (
            {"modules_to_save": ["embed_tokens"]},
            "modules_to_save has model.embed_tokens, which is packed and has no floats",
        ),
        (
            {"modules_to_save": ["up_proj"]},
            "modules_to_save has model.layers.0.mlp.up_proj, which is packed and has no",
        ),
    ],
)
def test_what_needs_floats_is_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_adapter(loaded(folder / "llama"), **{"target_modules": ["q_proj"], **settings})


def test_unpacked_tables_are_trained_whole(folder: Path) -> None:
    model = loaded(folder / "llama")
    unpack_tables(model)
    trained = with_adapter(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained(input_ids=TOKENS, labels=TOKENS).loss.backward()
    (head,) = [each for key, each in trained.named_parameters() if "modules_to_save" in key]
    assert float(head.grad.abs().max()) > 0


def test_peft_knows_packed_linears_whatever_is_imported_first() -> None:
    code = (
        "from peft import tuners\n"
        "print(*(kind.__name__ for kind in peft.LoraConfig()._custom_modules), "
        "tuners.tuners_utils._maybe_include_all_linear_layers.of_quantc)"
    )
    orders = ["import peft, quantc", "import quantc, peft"]
    assert run_forked(*(f"{order}\n{code}" for order in orders)) == ["QuantLinear True"] * 2
