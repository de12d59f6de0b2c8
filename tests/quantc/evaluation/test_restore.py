"""Parts of a quantized model, replaced by the original's for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.evaluation.blocks import Blocks
from quantc.evaluation.models import load_any, open_any
from quantc.evaluation.restore import Pair, channel_scales, restored
from quantc.recipe import Recipe
from quantc.runtime.layers import QuantLinear
from tests.helpers import quantize_saved
from tests.quantc.evaluation.spoiled import deep, save

TOKENS = torch.arange(3, 27)[None]
CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"method": "rtn", "preset": "fast", "group_size": 16, "bits": 3}


def opened(path: Path) -> Blocks:
    source = open_any(path, False)
    return Blocks.of(load_any(source, torch.float32, False, CPU), source)


def logits(blocks: Blocks) -> torch.Tensor:
    with torch.no_grad():
        return blocks.model(input_ids=TOKENS, use_cache=False).logits


def pair_of(folder: Path) -> tuple[Blocks, Blocks, Pair]:
    model, original = opened(folder / "packed"), opened(folder / "model")
    return model, original, Pair(model, original)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma2"])
def test_everything_restored_is_the_original(family: str, tmp_path: Path) -> None:
    save(deep(family, 2), tmp_path / "model")
    quantize_saved(tmp_path, **{**PLAIN, "head_bits": 4})
    model, original, pair = pair_of(tmp_path)
    before, wanted = logits(model), logits(original)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)
    with restored([*pair.blocks, *pair.outside]):
        torch.testing.assert_close(logits(model), wanted)
    linears = [part for at in range(2) for part in pair.linears(at, True)]
    with restored([*linears, *pair.outside]):
        torch.testing.assert_close(logits(model), wanted)
    assert torch.equal(logits(model), before)


def test_rotated_inputs_are_made_up_for(tmp_path: Path, rotation_pays: None) -> None:
    save(deep(blocks=2), tmp_path / "model")
    quantize_saved(tmp_path, preset="balanced", bits=3, group_size=16)
    model, original, pair = pair_of(tmp_path)
    assert all(part.spec.hadamard for part in model.model.modules() if isinstance(part, QuantLinear))
    for parts in (pair.blocks, [part for at in range(2) for part in pair.linears(at, True)]):
        with restored(parts):
            torch.testing.assert_close(logits(model), logits(original))


def test_linears_are_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    save(deep("mixtral", 2), tmp_path / "model")
    quantize_saved(tmp_path, **PLAIN)
    _, _, pair = pair_of(tmp_path)
    names = [part.name.removeprefix("model.layers.1.") for part in pair.linears(1, False)]
    assert names == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    ]  # fmt: skip


def test_blocks_of_a_model_with_rotated_hidden_states(tmp_path: Path) -> None:
    save(deep(blocks=4), tmp_path / "model")
    passes = [{"allocate": {"bits": 8, "group_size": 16}}, {"rotate": {"residual": "folded"}}, "quantize"]
    text = str(tmp_path / "model/text.txt")
    quantc.quantize(
        tmp_path / "model", out=tmp_path / "packed", calib=text, samples=4, seq_len=32,
        recipe=Recipe.from_dict({"version": 1, "passes": passes}),
    )  # fmt: skip
    model, original, pair = pair_of(tmp_path)
    assert model.rotation is not None
    wanted = logits(original)
    distances = []
    for parts in ([], pair.blocks[:1], pair.blocks[1:3], pair.blocks):
        with restored([*parts, *pair.outside]):
            distances.append(float((logits(model) - wanted).norm() / wanted.norm()))
    assert max(distances) < 0.05
    assert distances[-1] < 1e-4


def test_linears_whose_channels_were_scaled_are_restored_one_by_one(tmp_path: Path) -> None:
    model = deep(blocks=1)
    save(model, tmp_path / "model")
    block = model.model.layers[0]
    scales = torch.logspace(-1, 1, block.mlp.up_proj.weight.shape[0])
    with torch.no_grad():
        block.mlp.up_proj.weight /= scales[:, None]
        block.mlp.down_proj.weight *= scales
        for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            linear.weight *= block.input_layernorm.weight
        block.input_layernorm.weight.fill_(1)
        block.mlp.up_proj.weight += 0.01 * torch.randn(block.mlp.up_proj.weight.shape) / scales[:, None]
    save(model, tmp_path / "packed")
    ours, original, pair = pair_of(tmp_path)
    wanted = logits(original)
    parts = {part.name.rpartition(".")[2]: part for part in pair.linears(0, True)}
    assert set(parts) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    before = float((logits(ours) - wanted).norm())
    for name in parts:
        with restored([parts[name]]):
            left = float((logits(ours) - wanted).norm())
        assert left < (0.2 if name == "up_proj" else 1.01) * before, name


def test_scales_are_found_under_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(48, 64, generator=generator)
    rows, columns = torch.logspace(-1, 0.5, 48), torch.logspace(0.3, -0.3, 64)
    noisy = original + 0.1 * torch.randn(48, 64, generator=generator)
    found = channel_scales(rows[:, None] * noisy * columns, original)
    assert found is not None
    torch.testing.assert_close(found[0][:, None] * found[1], rows[:, None] * columns, rtol=0.1, atol=0)


@pytest.mark.parametrize("damage", ["rounded", "doubled", "zero", "another", "negative row"])
def test_damage_is_not_taken_for_scales(damage: str) -> None:
    generator = torch.Generator().manual_seed(0)
    original, noise = (torch.randn(48, 64, generator=generator) for _ in range(2))
    changed = {
        "rounded": original + 0.2 * noise,
        "doubled": 2 * original,
        "zero": 0 * original,
        "another": noise,
        "negative row": torch.cat([-original[:1], original[1:]]),
    }
    assert channel_scales(changed[damage], original) is None
