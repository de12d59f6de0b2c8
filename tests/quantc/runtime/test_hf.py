"""Loading through quantc and through transformers: the same model, saved back unchanged, never unpacked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.runtime.modules import PackedWeight
from tests.families import build
from tests.helpers import save_with_tokenizer, thinned

TOKENS = torch.tensor([[3, 17, 42, 99, 3, 7, 120, 64]])
MODELS = ["qwen2", "llama", "gpt2", "qwen2_moe"]  # tied, untied, tied with Conv1D, experts
TIED = {"qwen2", "gpt2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<model> and <model>-8 (8 bits, head too) and <model>-4 (4 bits) for every model."""
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        save_with_tokenizer(build(name), folder / name)
        quantc.quantize(folder / name, bits=8, head_bits=8, group_size=32, method="rtn", out=folder / f"{name}-8")
        quantc.quantize(folder / name, bits=4, group_size=32, method="rtn", out=folder / f"{name}-4")
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert two[name].dtype == tensor.dtype, name
        assert torch.equal(two[name], tensor), name


def held_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("name", MODELS)
def test_head_bits_8_is_close_to_the_float_model(folder: Path, name: str) -> None:
    expected = logits(build(name))
    found = logits(quantc.load(folder / f"{name}-8", dtype=torch.float32))
    assert float((found - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_a_tie_is_kept_as_one_table(folder: Path, name: str) -> None:
    reader = CheckpointReader(folder / f"{name}-8")
    tables = {tensor for tensor in reader.weight_map if tensor.endswith("qweight")}
    outside = {tensor for tensor in tables if ".layers." not in tensor and ".h." not in tensor}
    assert len(outside) == (1 if name in TIED else 2)
    model = quantc.load(folder / f"{name}-8")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, PackedWeight)
    assert isinstance(head, PackedWeight)
    assert (head is embedding) == (name in TIED)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_writes_the_same_tensors(folder: Path, tmp_path: Path, name: str, bits: int) -> None:
    packed = folder / f"{name}-{bits}"
    model = quantc.load(packed)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(saved_tensors(packed), saved_tensors(tmp_path / "again"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "third")
    assert_same_tensors(saved_tensors(packed), saved_tensors(tmp_path / "third"))


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_is_load(folder: Path, name: str) -> None:
    one = quantc.load(folder / f"{name}-4")
    two = AutoModelForCausalLM.from_pretrained(folder / f"{name}-4", dtype="auto").eval()
    assert_same_tensors(one.state_dict(), two.state_dict())
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_load_computes_in_the_dtype_asked_for_and_keeps_the_parts(folder: Path, dtype: torch.dtype | None) -> None:
    model = quantc.load(folder / "llama-4", dtype=dtype)
    wanted = dtype or torch.float32  # the tiny model's own
    assert model.dtype == wanted
    assert not model.training
    with torch.no_grad():
        assert model(input_ids=TOKENS).logits.dtype == wanted
    stored = saved_tensors(folder / "llama-4")
    for name, buffer in model.named_buffers():
        if name in stored:
            assert torch.equal(buffer, stored[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_that_of_the_unpacked_model(folder: Path, name: str) -> None:
    model = quantc.load(folder / f"{name}-4", dtype=torch.float32)
    prompt = TOKENS[:, :3]
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, min_new_tokens=12
    )
    assert out.shape == (1, 15)
    tokens = prompt
    for _ in range(12):
        with torch.no_grad():
            scores = model(input_ids=tokens, use_cache=False).logits[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        tokens = torch.cat([tokens, scores.argmax(1, keepdim=True)], dim=1)
    assert torch.equal(out, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_holds_no_unpacked_copy(folder: Path, name: str) -> None:
    model = quantc.load(folder / f"{name}-4", dtype=torch.float32)
    logits(model)
    stored = sum(tensor.nbytes for tensor in saved_tensors(folder / f"{name}-4").values())
    tables = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in model.state_dict())
    assert held_bytes(model) <= stored + tables
    assert not any(type(module) is nn.Linear for key, module in model.named_modules() if key.endswith("_proj"))


@pytest.mark.parametrize("order", thinned(["import transformers, quantc", "import quantc, transformers"], every=2))
def test_a_fresh_process_needs_only_import_quantc(folder: Path, order: str) -> None:
    script = (
        f"{order}\n"
        "import torch\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder / 'llama-4')!r})\n"
        "kinds = [type(module).__name__ for module in model.modules()]\n"
        "print(kinds.count('QuantLinear'), type(model).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(quantc.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["14", "LlamaForCausalLM"]


def test_import_quantc_is_cheap() -> None:
    script = "import quantc, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
