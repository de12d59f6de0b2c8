"""The quantize pass: experts that saw too little, kept linears, large weights, corrected targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantc
from quantc.calibration import gather, precision
from quantc.calibration.stream import CalibrationRun
from quantc.calibration.tokens import tokenize_documents
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import CalibrationError, UsageError
from quantc.formats import DENSE
from quantc.numerics import basis
from quantc.numerics.grids import fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.numerics.statistics import Drift, Gram
from quantc.passes.quantize import Quantize, QuantizeConfig
from quantc.pipeline import calibrated_work
from quantc.recipe import Recipe
from quantc.report import LinearReport, Report, read_report
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import block_works, in_memory_run, save_with_tokenizer
from tests.word_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("qwen2_moe"), tmp_path_factory.mktemp("moe") / "model")


def run(model: Path, out: Path, **settings: Any) -> Report:
    options = {"bits": 4, "group_size": 32, "calib": str(model / "text.txt"), "samples": 1, "seq_len": 12}
    preset = {} if "recipe" in settings else {"preset": "fast"}
    return quantc.quantize(model, out=out, **{**options, **preset, **settings})


def stored_weight(reader: CheckpointReader, name: str) -> torch.Tensor:
    """float32 (N, K): what the codes of a linear stand for."""
    entry = reader.entries[name]
    parts = {part: reader.tensor(f"{name}.{part}") for part in entry.layout()}
    return DENSE.unpack(parts, entry.spec, entry.shape).dequantize()


def stacks(report: Report) -> list[LinearReport]:
    return [linear for linear in report.linears if linear.experts]


def test_experts_that_saw_too_few_rows_fall_back_and_are_counted(moe: Path, tmp_path: Path) -> None:
    report = run(moe, tmp_path / "few")
    run(moe, tmp_path / "rtn", method="rtn")
    few, nearest = CheckpointReader(tmp_path / "few"), CheckpointReader(tmp_path / "rtn")
    assert len(stacks(report)) == 4
    mixed = [linear for linear in stacks(report) if 0 < linear.fallbacks < 4]
    assert mixed
    for linear in stacks(report):
        assert linear.rows == 12 * 2  # every token goes to two of the four experts
        parts = [(few.tensor(name), nearest.tensor(name)) for name in few.weight_map if name.startswith(linear.name)]
        same = sum(all(torch.equal(one[e], two[e]) for one, two in parts) for e in range(4))
        assert same == linear.fallbacks
        assert linear.method == {0: "gptq", 4: "rtn"}.get(linear.fallbacks, "gptq+rtn")
    assert report.fallbacks == sum(linear.fallbacks for linear in stacks(report))
    assert read_report(tmp_path / "few")["expert_fallbacks"] == report.fallbacks


def test_with_enough_rows_no_expert_falls_back(moe: Path, tmp_path: Path) -> None:
    report = run(moe, tmp_path / "out", samples=8, seq_len=48)
    assert report.fallbacks == 0
    assert {linear.method for linear in report.linears} == {"gptq"}
    assert all(linear.rows == 8 * 48 * (2 if linear.experts else 1) for linear in report.linears)


def test_without_calibration_nothing_counts_as_a_fallback(moe: Path, tmp_path: Path) -> None:
    report = run(moe, tmp_path / "out", method="rtn")
    assert report.fallbacks == 0
    assert {(linear.method, linear.rows) for linear in report.linears} == {("rtn", 0)}


def test_rounding_to_nearest_stays_that_where_another_pass_asked_for_statistics(tmp_path: Path) -> None:
    """The codes are those of the plain run; the report then knows the rows, and measures errors of outputs."""
    save_with_tokenizer(build("llama"), tmp_path / "model")
    passes = [{"allocate": {"head_bits": "keep"}}, {"group_channels": {}}, {"quantize": {}}]
    recipe = Recipe.from_dict({"version": 1, "passes": passes})
    measured = run(tmp_path / "model", tmp_path / "out", method="rtn", recipe=recipe)
    assert {(linear.method, linear.rows, linear.fallbacks) for linear in measured.linears} == {("rtn", 12, 0)}
    again = run(tmp_path / "model", tmp_path / "again", plan=tmp_path / "out/plan.yaml", method="rtn",
                bits=None, group_size=None)  # fmt: skip
    assert {linear.rows for linear in again.linears} == {0}
    one, two = (CheckpointReader(tmp_path / name).manifest["tensors"] for name in ("out", "again"))
    assert one == two


def test_what_is_kept_is_reported_with_the_reason(moe: Path, tmp_path: Path) -> None:
    report = run(moe, tmp_path / "out", method="rtn")
    mlps = [f"model.layers.{index}.mlp" for index in range(2)]
    routers = {f"{mlp}.gate": "it routes tokens to experts" for mlp in mlps}
    assert report.kept == routers | {f"{mlp}.shared_expert_gate": "it has a single output" for mlp in mlps}


def test_the_error_is_the_share_of_the_output_that_was_lost(tmp_path: Path) -> None:
    model = build("llama")
    save_with_tokenizer(model, tmp_path / "model")
    report = run(tmp_path / "model", tmp_path / "out", method="rtn")
    reader = CheckpointReader(tmp_path / "out")
    for linear in report.linears:
        weight = model.get_submodule(linear.name).weight.detach().double()
        rounded = stored_weight(reader, linear.name).double()
        lost = float((rounded - weight).square().sum() / weight.square().sum())
        assert linear.error == pytest.approx(lost, rel=1e-4)


def test_gptq_loses_less_of_the_output_than_rounding_to_nearest(tmp_path: Path) -> None:
    """Measured on the same inputs: those of the first block, which rounding changes in neither run."""
    save_with_tokenizer(build("llama"), tmp_path / "model")
    gptq = run(tmp_path / "model", tmp_path / "gptq", samples=8, seq_len=48, bits=3)
    names = [linear.name for linear in gptq.linears if ".layers.0." in linear.name]
    nearest = nearest_errors(tmp_path / "model", names)
    for linear in gptq.linears[: len(names)]:
        assert linear.error < nearest[linear.name]


def nearest_errors(folder: Path, names: list[str]) -> dict[str, float]:
    """Output error of 3-bit rounding to nearest for linears of block 0, on the same calibration inputs."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = tokenize_documents(make_tokenizer(adds_bos=False), [(folder / "text.txt").read_text()], 8, 48, 0)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    errors, spec = {}, QuantSpec(3, 32)
    for name, x in seen.items():
        weight = model.get_submodule(name).weight.detach()
        grid = fit_grid(weight, spec)
        rounded = QTensor(spec, round_to_nearest(weight, grid, spec), grid.scales, grid.zeros).dequantize()
        lost, whole = (x.double() @ w.double().T for w in (rounded - weight, weight))
        errors[name] = float(lost.square().sum() / whole.square().sum())
    return errors


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_large_weights_are_rounded_as_well_as_small_ones(tmp_path: Path, method: str) -> None:
    model, name = build("llama"), "model.layers.1.mlp.up_proj"
    model.get_submodule(name).weight.data.mul_(1e5)
    save_with_tokenizer(model, tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", method=method, samples=4, seq_len=32)
    weight = model.get_submodule(name).weight.detach()
    stored = stored_weight(CheckpointReader(tmp_path / "out"), name)
    assert float((stored - weight).square().sum() / weight.square().sum()) < 0.1


# Targets that make up for what the block's rounded weights changed, and distrusted correlations


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a stage of several activations first, one later, one with experts too, and a plain one."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("falcon_h1", "cohere", "qwen2_moe", "llama"):
        save_with_tokenizer(build(name), folder / name)
    return folder


def run_with(model: Path, out: Path, run_settings: dict[str, Any] | None = None, **quantize: Any) -> dict[str, str]:
    """Checksums of the tensors that a 3-bit recipe with these settings of quantize wrote."""
    passes = [{"allocate": {"head_bits": "keep"}}, {"quantize": quantize}]
    settings = {"bits": 3, "samples": 6, "seq_len": 32, **(run_settings or {})}
    run(model, out, recipe=Recipe.from_dict({"version": 1, "passes": passes}), **settings)
    return {name: entry["sha256"] for name, entry in CheckpointReader(out).manifest["tensors"].items()}


def output_errors(name: str, correct: float) -> list[float]:
    """For each block alone, rounded at 3 bits: the share of what it adds to tokens that were not calibrated on."""
    tokens, other = torch.randint(0, VOCAB, (40, 48), generator=torch.Generator().manual_seed(0)).split([32, 8])
    described = in_memory_run(build(name), bits=3, group_size=32)
    states = CalibrationRun(described.source.model, described.graph, other, described.device)
    entered = torch.cat([hidden for _, hidden in states.states()])
    errors = []
    for work in block_works(described, tokens):
        original = torch.cat([output for run in states.runs(work.block) if (output := run()) is not None])
        Quantize(QuantizeConfig(correct=correct)).build(work)
        work.replace_weights(described.graph.linears[linear] for linear in work.quantized)
        rounded = torch.cat([output for run in states.runs(work.block) if (output := run()) is not None])
        errors.append(float((rounded - original).norm() / (original - entered).norm()))
    return errors


@pytest.mark.parametrize(("name", "most"), [("llama", 0.95), ("gpt2", 0.9), ("olmo2", 0.97), ("bloom", 0.8)])
def test_correcting_lowers_what_a_block_puts_out_wrongly(
    name: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    plain, corrected = output_errors(name, 0.0), output_errors(name, 0.5)
    assert len(plain) == 2
    assert all(after < most * before for before, after in zip(plain, corrected, strict=True))


def test_no_share_is_no_correction(models: Path, tmp_path: Path) -> None:
    plain = run_with(models / "llama", tmp_path / "plain")
    assert run_with(models / "llama", tmp_path / "none", correct=0) == plain
    corrected = run_with(models / "llama", tmp_path / "half", correct=0.5)
    parts = {name for name, checksum in plain.items() if corrected[name] != checksum}
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}  # nothing was rounded before those
    assert {name.rpartition(".")[0] for name in parts} == {*CheckpointReader(tmp_path / "half").entries} - first


def test_the_share_of_the_correction_is_added_to_the_weights(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every correction were W itself, a quarter of it would make all scales a quarter larger."""
    run_with(models / "llama", tmp_path / "plain", {"samples": 2}, correct=1e-9, shrink=0.3)
    monkeypatch.setattr(Drift, "correction", lambda drift, gram, damp: torch.eye(len(gram)))
    run_with(models / "llama", tmp_path / "quarter", {"samples": 2}, correct=0.25, shrink=0.3)
    plain, quarter = CheckpointReader(tmp_path / "plain"), CheckpointReader(tmp_path / "quarter")
    for name, factor in (("q_proj", 1.0), ("o_proj", 1.25)):
        scales = f"model.layers.0.self_attn.{name}.scales"
        torch.testing.assert_close(quarter.tensor(scales), plain.tensor(scales) * factor, rtol=2e-3, atol=0)


def test_rounding_to_nearest_corrects_and_distrusts_nothing(models: Path, tmp_path: Path) -> None:
    plain = run_with(models / "llama", tmp_path / "plain", method="rtn")
    assert run_with(models / "llama", tmp_path / "half", method="rtn", correct=0.5, shrink=0.5) == plain


def test_what_too_few_rows_guide_is_not_corrected(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows are enough for a width of 64 here, but not for the feed-forward's 104."""
    monkeypatch.setattr(basis, "FEWEST_ROWS_SHARE", 0.1)
    few: dict[str, Any] = {"samples": 1, "seq_len": 8}
    half = run_with(models / "llama", tmp_path / "half", few, correct=0.5)
    plain = run_with(models / "llama", tmp_path / "plain", few)
    nearest = run_with(models / "llama", tmp_path / "nearest", few, method="rtn")
    for name, checksum in nearest.items():
        if "down_proj" in name:
            assert half[name] == checksum
    assert half["model.layers.0.mlp.up_proj.qweight"] not in (
        plain["model.layers.0.mlp.up_proj.qweight"], nearest["model.layers.0.mlp.up_proj.qweight"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["falcon_h1", "cohere", "qwen2_moe"])
def test_rounds_of_statistics_and_reruns_do_not_change_corrected_bytes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rounds: list[int] = []  # activations of each
    gathered = calibrated_work.gather_drifting

    def counted(*args: Any) -> Any:
        rounds.append(len(args[3]))
        return gathered(*args)

    monkeypatch.setattr(calibrated_work, "gather_drifting", counted)
    expected = run_with(models / name, tmp_path / "one", correct=0.5)
    few = len(rounds)
    assert run_with(models / name, tmp_path / "again", correct=0.5) == expected
    rounds.clear()
    monkeypatch.setattr(gather, "STATISTICS_BYTES", 1)
    assert run_with(models / name, tmp_path / "many", correct=0.5) == expected
    assert len(rounds) > few
    assert set(rounds) == {1}


def test_all_correlations_taken_off_leave_the_diagonal(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrunk = run_with(models / "llama", tmp_path / "shrunk", shrink=1, rounds=1)
    matrix = Gram.matrix.fget
    assert matrix is not None
    monkeypatch.setattr(Gram, "matrix", property(lambda gram: matrix(gram).diagonal().diag()))
    assert run_with(models / "llama", tmp_path / "diagonal", rounds=1) == shrunk
    monkeypatch.undo()
    assert run_with(models / "llama", tmp_path / "plain", rounds=1) != shrunk


@pytest.mark.parametrize("name", ["correct", "shrink"])
@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_what_is_not_a_share_is_refused_by_name(name: str, share: float) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict({"version": 1, "passes": ["allocate", {"quantize": {name: share}}]})
    needed = "a finite number is needed" if math.isnan(share) else "it is a share; choose one from 0 (none) to 1"
    assert str(caught.value).endswith(f"{name} is {share}, but {needed}.")


def test_rows_that_overflow_are_named_where_weights_are_corrected_too(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(3e38)
    save_with_tokenizer(model, tmp_path / "model")
    with pytest.raises(CalibrationError, match=r"100% of the rows that model\.layers\.1\.mlp\.gate_proj receives"):
        run_with(tmp_path / "model", tmp_path / "out", correct=0.5)
