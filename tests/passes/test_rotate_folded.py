"""The pass rotate with folds: exact or refused on every family, and the same in a loaded checkpoint."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import quantc
from quantc.calibration.stream import CalibrationRun
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import CheckpointError, UsageError
from quantc.frontend import open_model, to_meta
from quantc.graph import residual_rewrite
from quantc.graph.derive import derive
from quantc.numerics.hadamard import rotate, rotation
from quantc.passes import rotate as rotate_pass
from quantc.pipeline import sweep
from quantc.pipeline.calibrated_work import CalibratedWork
from quantc.pipeline.run import Run
from quantc.plan import Plan
from quantc.progress import LogProgress
from quantc.recipe import Recipe
from quantc.report import Report
from quantc.runtime.modules import unpack
from quantc.runtime.residual_hooks import attach
from tests.families import FAMILIES, VOCAB, build
from tests.helpers import save_with_tokenizer, thinned
from tests.whole.test_families import TOKENS

FOLDED = {"residual": "folded", "value": "folded"}
# Besides those with norms behind the writers: blocks that share weights, and rows scaled on their way to experts.
REFUSED = {"zamba2", "llama4_text"}
NO_FLOAT64 = {"xglm"}  # its mask is filled with the least value of float64 as a float32
VALUES_FOLDED = {"llama", "mixtral", "phi", "opt", "olmo2", "cohere", "nanochat", "mistral", "granite"}


@pytest.fixture(autouse=True)
def plain_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)


def recipe(*passes: Any, **settings: str) -> Recipe:
    chosen = passes or ({"rotate": settings or FOLDED},)
    return Recipe.from_dict(
        {"version": 1, "passes": [{"allocate": {"bits": 8, "group_size": 32}}, *chosen, "quantize"]}
    )


@dataclass
class Rewritten:
    """A run that has rewritten every block and rounded none."""

    run: Run
    changed: dict[str, torch.Tensor]

    @property
    def report(self) -> Report:
        return self.run.report

    def model(self, original: PreTrainedModel) -> PreTrainedModel:
        model = copy.deepcopy(original)
        model.load_state_dict(self.changed, strict=False)
        if self.run.residual is not None:
            attach(model, self.run.residual)
        return model


def rewrite(folder: Path, **settings: str) -> Rewritten:
    source = open_model(folder)
    graph = derive(source.model, source.load, to_meta)
    run = Run(source, graph, Plan(), Report("model", "out"), LogProgress())
    passes = recipe(**settings).build_passes()
    for item in passes:
        item.plan(run)
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(2))
    calibration = CalibrationRun(source.model, graph, tokens, run.device, folder)
    sweep.analyse(run, passes, calibration, tokens, folder)
    for block in graph.blocks:
        source.load(block.name)
        work = CalibratedWork(run, block, source.model.get_submodule(block.name), calibration)
        for item in passes:
            item.rewrite(work)
        calibration.advance(block)
    state = source.model.state_dict()
    return Rewritten(run, {name: state[name].clone() for name in run.edited})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the grouped product knows no float64
    return model.double()


@pytest.mark.parametrize("name", thinned(list(FAMILIES), every=4))
def test_the_rewritten_model_computes_the_same_or_is_refused(name: str, tmp_path: Path) -> None:
    original = build(name)
    save_with_tokenizer(original, tmp_path)
    found = rewrite(tmp_path)
    refused = "post_norm" in FAMILIES[name].traits or name in REFUSED
    assert (found.run.residual is None) == refused == ("rotate residual" in found.report.refused)
    assert found.report.rewrites.get("rotate", {}).get("residual", 0) == (not refused)
    if name in VALUES_FOLDED:
        assert found.report.rewrites["rotate"]["value"] == len(found.run.graph.blocks)
    values = "value" in found.report.rewrites.get("rotate", {})
    assert values or any(":in" in entry or entry == "rotate value" for entry in found.report.refused)
    rewritten = found.model(original)
    if name not in NO_FLOAT64:
        original, rewritten = in_float64(original), in_float64(rewritten)
    assert difference(logits(rewritten), logits(original)) < 1e-6  # new weights are float32


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "gpt2"])
def test_a_linear_is_rotated_once_by_a_fold_or_online(name: str, tmp_path: Path) -> None:
    save_with_tokenizer(build(name), tmp_path)
    found = rewrite(tmp_path)
    for block in found.run.graph.blocks:
        normed = {norm.name for norm in block.norms if norm.of_residual}
        for item in block.activations:
            folded = item.writers[:1] and item.writers[0] in normed and found.run.residual
            folded = folded or (item.kind == "value" and f"rotate {item.label}" not in found.report.refused)
            for linear in block.readers(item):
                assert (found.run.plan.specs[linear.name].hadamard == 0) == bool(folded), linear.name


def test_a_refusal_in_a_later_block_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama4_text"), tmp_path)
    found = rewrite(tmp_path, residual="folded")
    reason = found.report.refused["rotate residual"]
    assert reason == "the output of model.layers.1 changed on the probe; rotated online instead"
    assert not found.changed
    assert all(spec.hadamard for spec in found.run.plan.specs.values())


def test_a_norm_before_the_residual_add_is_named(tmp_path: Path) -> None:
    save_with_tokenizer(build("gemma3_text"), tmp_path)
    reason = rewrite(tmp_path).report.refused["rotate residual"]
    assert "model.layers.0.post_attention_layernorm is between a linear and the residual stream" in reason


def test_a_forgotten_writer_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = residual_rewrite.find_writers
    monkeypatch.setattr(residual_rewrite, "find_writers", lambda *given: dict(list(whole(*given).items())[1:]))
    save_with_tokenizer(build("llama"), tmp_path)
    found = rewrite(tmp_path, residual="folded")
    assert "changed on the probe" in found.report.refused["rotate residual"]
    assert not found.changed


@pytest.mark.parametrize("fault", ["gain", "reader", "direction"])
def test_a_wrong_fold_is_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = residual_rewrite.BlockTurn.edits

    def wrong(self: residual_rewrite.BlockTurn, module: torch.nn.Module) -> Any:
        for name, value in whole(self, module):
            if fault == "gain" and name == "input_layernorm.weight":
                value = value * 1.01
            if fault == "direction" and name == "mlp.down_proj.weight":
                value = rotate(module.get_parameter(name).double().T, self.order).T
            if fault != "reader" or name != "self_attn.k_proj.weight":
                yield name, value

    monkeypatch.setattr(residual_rewrite.BlockTurn, "edits", wrong)
    save_with_tokenizer(build("llama"), tmp_path)
    found = rewrite(tmp_path, residual="folded")
    assert "changed on the probe" in found.report.refused["rotate residual"]
    assert not found.changed


def test_a_wrong_rotation_of_heads_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> Any:
        edits = whole(*given)
        return edits | {"self_attn.o_proj.weight": edits["self_attn.o_proj.weight"].roll(1, -1)}

    whole = rotate_pass.rotate_heads
    monkeypatch.setattr(rotate_pass, "rotate_heads", wrong)
    save_with_tokenizer(build("llama"), tmp_path)
    found = rewrite(tmp_path, value="folded")
    assert (
        list(found.report.refused.values()) == ["the block's output changed on the probe; rotated online instead"] * 2
    )
    assert not found.changed


def test_query_heads_share_the_rotation_of_their_value_head(tmp_path: Path) -> None:
    model = build("llama")  # 4 query heads, 2 value heads of 16
    save_with_tokenizer(model, tmp_path)
    changed = rewrite(tmp_path, value="folded").changed
    attention, turned = model.model.layers[1].self_attn, rotation(16, 16)
    v, o = attention.v_proj.weight.detach().double(), attention.o_proj.weight.detach().double()
    found = changed["model.layers.1.self_attn.v_proj.weight"].double()
    for head in range(2):
        rows = slice(16 * head, 16 * head + 16)
        torch.testing.assert_close(found[rows], turned.T @ v[rows], rtol=0, atol=1e-6)
    found = changed["model.layers.1.self_attn.o_proj.weight"].double()
    for head in range(4):
        columns = slice(16 * head, 16 * head + 16)
        torch.testing.assert_close(found[:, columns], o[:, columns] @ turned, rtol=0, atol=1e-6)
    assert len(changed) == 4


def test_norms_keep_no_gain_and_no_bias(tmp_path: Path) -> None:
    for name, norm, kept in (("gpt2", "transformer.h.0.ln_1", 1), ("gemma", "model.layers.0.input_layernorm", 0)):
        save_with_tokenizer(build(name), tmp_path / name)
        changed = rewrite(tmp_path / name).changed
        assert bool((changed[f"{norm}.weight"] == kept).all())
        assert f"{norm}.bias" not in changed or not changed[f"{norm}.bias"].any()


@pytest.mark.parametrize("weights", [0, 1])
def test_zero_weights_and_biases_hide_no_writer(weights: int, tmp_path: Path) -> None:
    """Biases that are zero in the first block only, or a first block that adds nothing, as in grown models."""
    model = build("opt")
    first = model.model.decoder.layers[0]
    for parameter in (*first.self_attn.out_proj.parameters(), *list(first.fc2.parameters())[1 - weights :]):
        torch.nn.init.zeros_(parameter)
    save_with_tokenizer(model, tmp_path)
    found = rewrite(tmp_path, residual="folded")
    assert not found.report.refused
    assert difference(logits(found.model(model)), logits(model)) < 1e-5


def test_a_norms_bias_stays_where_a_reader_has_none(tmp_path: Path) -> None:
    model = build("phimoe")
    save_with_tokenizer(model, tmp_path)
    found = rewrite(tmp_path)
    assert found.changed["model.layers.0.post_attention_layernorm.bias"].any()


E2E = ["llama", "qwen2", "gpt2", "opt", "phi", "gemma", "mixtral", "gpt_oss", "mamba", "cohere", "gemma3_text"]


def packed(folder: Path, model: PreTrainedModel, chosen: Recipe) -> Report:
    save_with_tokenizer(model, folder / "model")
    return quantc.quantize(
        folder / "model", recipe=chosen, out=folder / "packed", calib=str(folder / "model/text.txt"), samples=4,
        seq_len=32, force=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", thinned(E2E, every=3))
def test_a_checkpoint_in_8_bits_is_near_the_original(name: str, tmp_path: Path) -> None:
    model = build(name)
    report = packed(tmp_path, model, recipe())
    config = CheckpointReader(tmp_path / "packed").config["quantization_config"]
    assert ("residual_rotation" in config) == (name != "gemma3_text") == ("rotate residual" not in report.refused)
    assert config["version"] == (2 if "residual_rotation" in config else 1)
    loaded = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    expected = logits(model)
    lost = (logits(loaded) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert lost.median() < 0.03  # of a token: rounding may send a single one to another expert


@pytest.mark.parametrize("order", [["importance", "rotate", "scale"], ["scale", "rotate"], ["rotate", "scale"]])
def test_it_composes_with_importance_and_scale(order: list[str], tmp_path: Path) -> None:
    model = build("llama")
    passes = [{"rotate": FOLDED} if name == "rotate" else name for name in order]
    report = packed(tmp_path, model, recipe(*passes))
    assert report.rewrites["rotate"] == {"residual": 1, "value": 2}
    assert not report.refused
    assert difference(logits(quantc.load(tmp_path / "packed", dtype=torch.float32)), logits(model)) < 0.03


def test_before_plain_rounding_nothing_is_folded(tmp_path: Path) -> None:
    report = packed(tmp_path, build("llama"), recipe().with_settings(quantize={"method": "rtn"}))
    assert {linear.method for linear in report.linears} == {"rtn"}
    assert not report.rewrites
    assert "residual_rotation" not in CheckpointReader(tmp_path / "packed").config["quantization_config"]


def test_every_way_of_loading_rotates(tmp_path: Path) -> None:
    packed(tmp_path, build("gpt2"), recipe())
    expected = logits(quantc.load(tmp_path / "packed", dtype=torch.float32))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = quantc.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    torch.testing.assert_close(logits(unpack(again, torch.float32)), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="belong to rotated hidden states"):
        loaded.dequantize()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_cached_decoding_and_compiled_models_rotate(tmp_path: Path) -> None:
    packed(tmp_path, build("llama"), recipe())
    model = quantc.load(tmp_path / "packed", dtype=torch.float32)
    expected = logits(model)
    with torch.no_grad():
        start = model(input_ids=TOKENS[:, :-1], use_cache=True)
        last = model(input_ids=TOKENS[:, -1:], past_key_values=start.past_key_values).logits
        torch.testing.assert_close(last, expected[:, -1:], rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, backend="eager")(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_edited_floats_that_bfloat16_cannot_hold_are_stored_in_float32(tmp_path: Path) -> None:
    model = build("opt").to(torch.bfloat16)
    packed(tmp_path, model, recipe())
    reader = CheckpointReader(tmp_path / "packed")
    layer = "model.decoder.layers.0"
    assert reader.tensor(f"{layer}.fc2.bias").dtype == torch.float32
    assert reader.tensor(f"{layer}.self_attn_layer_norm.weight").dtype == torch.bfloat16
    whole = quantc.load(tmp_path / "packed", dtype=torch.float32)
    assert difference(logits(whole), logits(model.float())) < 0.03
    assert (
        quantc.load(tmp_path / "packed", dtype=torch.bfloat16).model.decoder.layers[0].fc2.bias.dtype == torch.bfloat16
    )


def test_modules_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    packed(tmp_path, build("llama"), recipe())
    file, manifest = tmp_path / "packed/config.json", tmp_path / "packed/quantc.json"
    config, written = (json.loads(each.read_text(encoding="utf-8")) for each in (file, manifest))
    config["quantization_config"]["residual_rotation"]["last"] = "model.layers.7"
    del config["quantization_config"]["sha256"], written["files"]  # an earlier quantc wrote neither
    file.write_text(json.dumps(config), encoding="utf-8")
    manifest.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(CheckpointError, match="to model.layers.7, but LlamaForCausalLM has no such modules"):
        quantc.load(tmp_path / "packed")


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(UsageError, match="residual is 'fold', but 'online' or 'folded' is needed"):
        recipe(residual="fold")
