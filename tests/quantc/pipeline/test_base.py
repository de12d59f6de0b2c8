"""The runner: orders it refuses, and what must not change the bytes it writes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import quantc
from quantc.calibration import gather, hidden_states, precision
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import CalibrationError, PassError
from quantc.graph.model_graph import Activation
from quantc.pipeline import calibrated_work, sweep
from quantc.pipeline.base import REGISTRY, Fact, Pass, check_order
from quantc.recipe import DEFAULT, Recipe
from quantc.report import Report
from tests.families import FAMILIES, build
from tests.helpers import save_with_tokenizer

ALLOCATE, QUANTIZE = (REGISTRY[name](REGISTRY[name].Config()) for name in ("allocate", "quantize"))


@dataclasses.dataclass(frozen=True)
class Empty:
    """No settings."""


class Rewriting(Pass):
    """A pass that makes a plan worthless."""

    name: ClassVar[str] = "rewriting"
    Config: ClassVar[type] = Empty
    breaks = frozenset({Fact.PLANNED})


# Orders


@pytest.mark.parametrize("name", REGISTRY)
def test_a_registered_pass_says_what_it_is(name: str) -> None:
    kind = REGISTRY[name]
    assert kind.name == name
    assert issubclass(kind, Pass)
    assert dataclasses.is_dataclass(kind.Config)
    given = {fact for other in REGISTRY.values() for fact in other.gives}
    assert kind.needs <= given


def test_the_default_recipe_is_in_order() -> None:
    check_order(DEFAULT.build_passes())


@pytest.mark.parametrize("passes", [[QUANTIZE], [QUANTIZE, ALLOCATE], [ALLOCATE, Rewriting(Empty()), QUANTIZE]])
def test_a_need_that_is_not_met_is_named_with_who_meets_it(passes: list[Pass]) -> None:
    with pytest.raises(PassError) as caught:
        check_order(passes)
    assert str(caught.value) == (
        "the pass quantize needs that every linear has a spec, which no pass before it provides; "
        "put allocate before it."
    )


@pytest.mark.parametrize("passes", [[], [ALLOCATE]])
def test_a_recipe_that_quantizes_nothing_is_refused(passes: list[Pass]) -> None:
    with pytest.raises(PassError, match="the recipe ends with float weights; a recipe needs the pass quantize"):
        check_order(passes)


def test_a_wrong_order_fails_before_the_model_is_opened(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({"version": 1, "passes": ["quantize"]})
    with pytest.raises(PassError, match="put allocate before it"):
        quantc.quantize(tmp_path / "no model here", recipe=recipe, out=tmp_path / "out")


# Runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2_moe"):
        save_with_tokenizer(build(name), folder / name)
    return folder


def run(model: Path, out: Path, **settings: Any) -> Report:
    options = {
        "preset": "fast",
        "bits": 3,
        "group_size": 32,
        "calib": str(model / "text.txt"),
        "samples": 6,
        "seq_len": 32,
    }
    return quantc.quantize(model, out=out, **{**options, **settings})


def checksums(folder: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in CheckpointReader(folder).manifest["tensors"].items()}


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_a_seed_makes_a_run_repeat(models: Path, tmp_path: Path, name: str) -> None:
    for out, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(models / name, tmp_path / out, seed=seed)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")
    assert checksums(tmp_path / "one") != checksums(tmp_path / "other")


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_rounds_of_statistics_do_not_change_the_bytes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    passes_over_a_block = count_calls(monkeypatch, calibrated_work, "gather")
    run(models / name, tmp_path / "one")
    once = len(passes_over_a_block)
    monkeypatch.setattr(gather, "STATISTICS_BYTES", 1)
    run(models / name, tmp_path / "many")
    assert len(passes_over_a_block) - once >= 4 * once
    assert checksums(tmp_path / "one") == checksums(tmp_path / "many")


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """A list that grows by one with every call of a method."""
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_rounds_fit_the_limit_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "STATISTICS_BYTES", 10 * 10 * 4 * 3)
    items = [Activation(str(i), "normed", width, (), ()) for i, width in enumerate([10, 10, 10, 10, 100, 1])]
    rounds = [[item.label for item in found] for found in gather.rounds(items, lambda _: 1)]
    assert rounds == [["0", "1", "2"], ["3"], ["4"], ["5"]]


def test_spilled_hidden_states_do_not_change_the_bytes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(models / "llama", tmp_path / "memory")
    monkeypatch.setattr(hidden_states, "SPILL_BYTES", 0)
    files = count_calls(monkeypatch, hidden_states.tempfile, "TemporaryFile")
    run(models / "llama", tmp_path / "file")
    assert len(files) == 1
    assert checksums(tmp_path / "memory") == checksums(tmp_path / "file")
    names = [{file.name for file in (tmp_path / out).iterdir()} for out in ("memory", "file")]
    assert names[0] == names[1]


def test_a_file_of_hidden_states_has_its_disk_space_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that has no room is found before hours of work."""
    monkeypatch.setattr(hidden_states, "SPILL_BYTES", 0)
    states = hidden_states.HiddenStates((64, 1024), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(states._file.fileno()).st_blocks * 512 >= 64 * 1024 * 4
    assert states.read(0, 64).shape == (64, 1024)


def test_a_block_is_calibrated_on_the_outputs_of_the_rounded_ones(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[torch.Tensor] = []
    original = hidden_states.HiddenStates.write

    def write(states: Any, start: int, hidden: torch.Tensor) -> None:
        written.append(hidden.detach().clone())
        original(states, start, hidden)

    monkeypatch.setattr(hidden_states.HiddenStates, "write", write)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    run(models / "llama", tmp_path / "out")
    embedded, handed_on = written  # one batch: what enters block 0, and what leaves it
    found, unrounded = outputs_of_block_0(embedded, tmp_path / "out"), outputs_of_block_0(embedded, None)
    torch.testing.assert_close(handed_on, found, rtol=1e-4, atol=1e-4)
    assert float((handed_on - unrounded).norm() / unrounded.norm()) > 0.01


def outputs_of_block_0(hidden: torch.Tensor, checkpoint: Path | None) -> torch.Tensor:
    """What the first block of the tiny llama makes of hidden states, with a checkpoint's weights or its own."""
    model = (build("llama") if checkpoint is None else quantc.load(checkpoint, dtype=torch.float32)).model
    seen: list[torch.Tensor] = []
    hook = model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(inputs_embeds=hidden, use_cache=False)
    hook.remove()
    return seen[0]


def test_round_to_nearest_needs_no_calibration(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "CalibrationRun", None)
    report = run(models / "llama", tmp_path / "out", method="rtn", calib=str(tmp_path / "no such file"))
    assert {linear.method for linear in report.linears} == {"rtn"}
    assert report.calibration == ""
    assert CheckpointReader(tmp_path / "out").manifest["calibration_sha256"] is None


def test_what_is_not_quantized_keeps_its_name_dtype_and_bits(tmp_path: Path) -> None:
    model = build("llama").bfloat16()
    save_with_tokenizer(model, tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", head_bits="keep")
    reader = CheckpointReader(tmp_path / "out")
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_proj.weight")}
    packed = {f"{name}.{part}" for name, entry in reader.entries.items() for part in entry.layout()}
    assert {*kept, *packed} == set(reader.weight_map)
    for name, tensor in kept.items():
        assert reader.tensor(name).dtype == torch.bfloat16
        assert torch.equal(reader.tensor(name), tensor)


def test_the_report_adds_up(models: Path, tmp_path: Path) -> None:
    report = run(models / "llama", tmp_path / "out", head_bits="keep")
    reader = CheckpointReader(tmp_path / "out")
    stored = {name: 8 * sum(reader.tensor(f"{name}.{part}").nbytes for part in entry.layout())
              for name, entry in reader.entries.items()}  # fmt: skip
    weights = sum(entry.shape[0] * entry.shape[1] for entry in reader.entries.values())
    assert report.bits_per_weight == pytest.approx(sum(stored.values()) / weights)
    assert {linear.name: linear.bits_per_weight * linear.weights for linear in report.linears} == pytest.approx(stored)
    assert report.weights_bytes == reader.weights_bytes()
    assert report.source_bytes == (models / "llama/model.safetensors").stat().st_size
    assert all(0 < linear.error < 0.2 and linear.rows == 6 * 32 for linear in report.linears)


# Calibration that goes wrong


def test_a_text_that_is_too_short_says_so_and_leaves_nothing(models: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w5 w6 w7 " * 4)
    with pytest.raises(CalibrationError) as caught:
        run(models / "llama", tmp_path / "out", calib=str(text))
    assert str(caught.value) == (
        "the calibration text has 13 tokens, but one sample needs 32; give a longer text or a smaller --seq-len."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["short.txt"]


def broken_model(folder: Path, changes: dict[str, tuple[Any, float]], name: str = "llama", **settings: Any) -> Path:
    """A tiny model some of whose parameters hold a huge value: name -> (index, value)."""
    model = build(name)
    if settings:
        torch.manual_seed(0)
        config = AutoConfig.for_model(FAMILIES[name].model_type, **FAMILIES[name].settings, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter, (index, value) in changes.items():
        model.get_parameter(parameter).data[index] = value
    return save_with_tokenizer(model, folder)


BIASES = {"attention_bias": True, "mlp_bias": True}


def test_outputs_that_overflow_name_the_block_and_the_share(tmp_path: Path) -> None:
    huge = {f"model.layers.0.{name}.bias": (slice(None), 3e38) for name in ("self_attn.o_proj", "mlp.down_proj")}
    model = broken_model(tmp_path / "model", huge, **BIASES)
    with pytest.raises(CalibrationError) as caught:
        run(model, tmp_path / "out")
    assert str(caught.value) == (
        "100% of the rows that model.layers.0 puts out are NaN or infinite, and past 10% statistics mean nothing; "
        "check that the model runs in float32 on this text."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_few_rows_that_overflow_are_counted_and_left_out(tmp_path: Path) -> None:
    """The embedding of one word overflows with the first block's bias: its row is lost, all others are not."""
    huge = {
        "model.embed_tokens.weight": (17, 3e38),
        "model.layers.0.mlp.down_proj.bias": (slice(None), 1e38),
    }
    model = broken_model(tmp_path / "model", huge, **BIASES)
    (model / "text.txt").write_text("w5 w6 w7 w8 " * 24 + "w17")
    report = run(model, tmp_path / "out", samples=2, seq_len=48)
    assert report.notes == ["model.layers.0 put out 1 non-finite calibration rows; they were left out"]


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_that_overflows_names_the_block_and_the_share(tmp_path: Path, norm: str) -> None:
    model = broken_model(tmp_path / "model", {f"model.layers.1.{norm}.weight": (slice(None), 3e38)})
    with pytest.raises(CalibrationError, match=r"\d+% of the rows .*model\.layers\.1"):
        run(model, tmp_path / "out")
