"""Trellis codes from the command's settings to a model that runs: families, passes, budgets, the choice, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import QuantcError, UsageError
from quantc.passes.allocate import TRELLIS_NOTE
from quantc.plan import Plan, read_plan
from quantc.planning.sizes import weights_bytes
from quantc.recipe import Recipe
from quantc.sensitivity import Candidate, Losses
from quantc.sensitivity.wide_rows import with_wide_rows
from quantc.spec import QuantSpec, spec_of_label, trellis_spec
from tests.families import VOCAB, build
from tests.helpers import check_runs_as_unpacked, opened_run, quantize_saved, save_with_tokenizer, thinned

TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def saved(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)
    save_with_tokenizer(build(family), folder / "model")
    return folder


def codes_of(folder: Path) -> dict[str, QuantSpec]:
    return {name: entry.spec for name, entry in CheckpointReader(folder).entries.items()}


@pytest.mark.parametrize("family", thinned(["llama", "mixtral", "gpt_oss", "gpt2", "qwen3_moe", "gemma3_text"], 3))
def test_every_linear_has_them_and_the_model_runs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(family, tmp_path, monkeypatch)
    report = quantize_saved(tmp_path, bits=3, code="trellis", preset="balanced")
    assert not any("does not divide" in note for note in report.notes)  # rows are no groups that did not fit
    specs = codes_of(tmp_path / "packed")
    assert {(spec.code, spec.bits) for spec in specs.values()} == {("trellis", 3)}
    assert CheckpointReader(tmp_path / "packed").config["quantization_config"]["version"] == 5
    assert report.weights_bytes == weights_bytes(opened_run(tmp_path / "model"), dict(specs))
    check_runs_as_unpacked(tmp_path / "packed", TOKENS)


def test_every_pass_runs_before_and_after(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    before = ["allocate", "importance", "scale", "rotate", "group_channels", "compensate"]
    passes = [*before, {"quantize": {"rounds": 1, "correct": 0.5}}, {"tune": {"steps": 3}}, {"distill": {"steps": 2}}]
    recipe = Recipe.from_dict({"version": 1, "passes": passes})
    quantize_saved(tmp_path, recipe=recipe, bits=2, code="trellis")
    assert {spec.code for spec in codes_of(tmp_path / "packed").values()} == {"trellis"}
    check_runs_as_unpacked(tmp_path / "packed", TOKENS)


def test_tune_leaves_trellis_codes_alone_and_trains_the_grids_beside_them(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    plain = {name: None for name in opened_run(tmp_path / "model").graph.linears}
    for name, code in (("trellis", None), ("mixed", QuantSpec(3, 32))):
        specs = {linear: trellis_spec(3) for linear in plain}
        if code is not None:
            specs |= {linear: code for linear in plain if linear.endswith("up_proj")}
        (tmp_path / f"{name}.yaml").write_text(Plan(dict(specs)).to_yaml())
        found = {}
        for steps in (0, 20):
            passes = ["allocate", "quantize", *([{"tune": {"steps": steps}}] if steps else [])]
            recipe = Recipe.from_dict({"version": 1, "passes": passes})
            out = tmp_path / f"{name}{steps}"
            text = {"calib": str(tmp_path / "model/text.txt"), "samples": 8, "seq_len": 32}
            quantc.quantize(tmp_path / "model", out=out, plan=tmp_path / f"{name}.yaml", recipe=recipe, **text)
            reader = CheckpointReader(out)
            found[steps] = {part: reader.tensor(part) for part in reader.weight_map if part.endswith("scales")}
        moved = {part for part, scales in found[0].items() if not torch.equal(scales, found[20][part])}
        assert moved == {part for part in found[0] if "up_proj" in part and name == "mixed"}


def test_a_plan_with_rows_of_two_widths_is_built_again_from_its_file(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    run = opened_run(tmp_path / "model")
    plan = Plan()
    for place, (name, linear) in enumerate(run.graph.linears.items()):
        n = linear.shape[0]
        plan.specs[name] = QuantSpec(2 + place % 3, -1, code="trellis", wide_rows=n // 2)
        plan.salience[name] = torch.rand(n, generator=torch.Generator().manual_seed(place))
    plan.write(tmp_path / "plan.yaml")
    quantize_saved(tmp_path, plan=tmp_path / "plan.yaml")
    assert codes_of(tmp_path / "packed") == plan.specs
    assert read_plan(tmp_path / "packed/plan.yaml").specs == plan.specs
    check_runs_as_unpacked(tmp_path / "packed", TOKENS)


def test_rows_of_two_widths_come_in_whole_tiles() -> None:
    specs = [spec for bits in (2, 3) if (spec := spec_of_label(f"trellis{bits}"))]
    losses = Losses({"a": [Candidate(spec, 1.0 / spec.bits) for spec in specs]}, {"a": torch.rand(576).half()})
    rows = {candidate.spec.wide_rows for candidate in with_wide_rows(losses)["a"]}
    assert rows <= set(range(0, 576, 64))
    assert len(rows) > 5


@pytest.mark.parametrize("code", ["trellis", "auto"])
def test_a_budget_chooses_among_their_widths(code: str, tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    report = quantize_saved(tmp_path, avg_bits=3.9, code=code, preset="balanced")
    specs = codes_of(tmp_path / "packed")
    assert any(spec.code == "trellis" for spec in specs.values())
    if code == "trellis":
        assert all(spec.code == "trellis" or spec.bits > 5 for spec in specs.values())
    assert len({(spec.code, spec.bits) for spec in specs.values()}) > 1
    assert 3 < report.bits_per_weight <= 3.9


def test_what_loses_less_on_the_grid_stays_there(tmp_path: Path) -> None:
    """Weights that are whole multiples of a step: 4 bits of a grid hold them exactly, a trellis does not."""
    model = build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_proj" in name:
                parameter.copy_(torch.randint(-8, 8, parameter.shape) * 0.01)
    save_with_tokenizer(model, tmp_path / "model")
    report = quantize_saved(tmp_path, bits=4, code="auto", method="rtn")
    specs = codes_of(tmp_path / "packed")
    assert all(spec.code == "uniform" for name, spec in specs.items() if "gate_proj" in name)
    plan = read_plan(tmp_path / "packed/plan.yaml")
    assert plan.specs == {name: spec for name, spec in specs.items() if name in plan.specs}
    grids = sum(spec.code == "uniform" for spec in specs.values())
    assert f"{grids} of {len(specs)} layers are on grids: trellis codes lose more there" in report.notes
    assert "grid: trellis codes lose" in (tmp_path / "packed/plan.yaml").read_text()


def test_a_pin_is_no_choice_and_a_rank_stays(tmp_path: Path) -> None:
    """Each layer is tried against the grid of its own width, and with the low-rank part that it has."""
    save_with_tokenizer(build("llama"), tmp_path / "model")
    recipe = Recipe.from_dict({"version": 1, "passes": ["allocate", {"compensate": {"rank": 2}}, "quantize"]})
    quantize_saved(tmp_path, recipe=recipe, bits=3, code="auto", pins={"*gate_proj": 2, "*up_proj": 8})
    for name, spec in codes_of(tmp_path / "packed").items():
        wanted = 2 if "gate_proj" in name else 8 if "up_proj" in name else 3
        assert (spec.bits, spec.rank) == (wanted, 2), name


def test_a_target_has_grids_whatever_loses_less(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    quantize_saved(tmp_path, bits=4, code="auto", target="vllm")
    assert {spec.code for spec in codes_of(tmp_path / "packed").values()} == {"uniform"}


def test_a_search_refines_their_plan(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    quantize_saved(tmp_path, avg_bits=3.9, code="trellis", search=1)
    assert any(spec.code == "trellis" for spec in codes_of(tmp_path / "packed").values())


def test_without_calibration_text_the_choice_is_the_grid(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    report = quantize_saved(tmp_path, bits=4, code="auto", calib="none")
    assert {spec.code for spec in codes_of(tmp_path / "packed").values()} == {"uniform"}
    assert any("allocate has code grid instead of auto" in note for note in report.notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "vllm"}, "--target vllm is for grids, and --code is trellis"),
        ({"group_size": 64}, "--group-size 64 is for grids, and --code is trellis"),
        ({"symmetric": True}, "--symmetric is for grids, and --code is trellis"),
        ({"bits": 6}, "--bits 6 is for grids, and --code is trellis"),
        ({"formats": ["w4g64"]}, "--formats is for grids, and --code is trellis"),
        ({"code": "vector"}, "--code is 'vector', but only grid, trellis and auto exist"),
        ({"sparsity": 0.5}, "--sparsity drops weights of grids, and --code is trellis; remove one of the two"),
        ({"bits": 1, "code": "grid"}, "bits is 1, but codes have 2 to 8 bits"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        quantize_saved(tmp_path, **{"bits": 3, "code": "trellis", **settings})
    assert not (tmp_path / "packed").exists()


def test_a_table_is_read_by_rows_and_has_none(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    run = opened_run(tmp_path / "model")
    plan = Plan(dict.fromkeys(run.graph.linears, QuantSpec(3, -1, code="trellis")))
    plan.specs["model.embed_tokens.weight"] = QuantSpec(3, -1, code="trellis")
    plan.write(tmp_path / "plan.yaml")
    with pytest.raises(UsageError, match=r"model\.embed_tokens\.weight"):
        quantize_saved(tmp_path, plan=tmp_path / "plan.yaml")


@pytest.mark.parametrize("target", ["gguf", "vllm", "compressed-tensors", "gptq", "awq", "auto-round", "mlx"])
def test_exports_name_what_the_target_does_not_hold(target: str, tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    quantize_saved(tmp_path, bits=3, code="trellis")
    with pytest.raises(QuantcError, match="trellis") as caught:
        quantc.export(tmp_path / "packed", to=target, out=tmp_path / "exported")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 3}, True),
        ({"avg_bits": 3.4}, True),
        ({"bits": 4}, False),
        ({"bits": 3, "code": "trellis"}, False),
        ({"bits": 3, "group_size": 16}, False),
        ({"bits": 3, "target": "vllm", "symmetric": True}, False),
    ],
)
def test_narrow_grids_by_default_come_with_a_word_on_trellis_codes(
    settings: dict[str, Any], said: bool, tmp_path: Path
) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    assert (TRELLIS_NOTE in quantize_saved(tmp_path, **settings).notes) is said
