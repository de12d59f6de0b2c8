"""Averages of bits: kept to the bit, mixed precision by loss, refused where impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quantc
from quantc import api
from quantc.checkpoint.reader import CheckpointReader
from quantc.driver.job import Job
from quantc.driver.settings import allocation, default_name
from quantc.errors import UsageError
from quantc.frontend import open_model
from quantc.plan import Plan, read_plan
from quantc.planning.candidates import CANDIDATE_BITS
from quantc.spec import QuantSpec
from tests.families import build
from tests.helpers import first_blocks, quantize_saved, save_with_tokenizer
from tests.quantc.cli_runner import run as run_command

CALIBRATION = {"samples": 4, "seq_len": 32}
TRAINED = Path(__file__).parent.parent / "tiny_model" / "model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocate")
    (folder / "model").mkdir()
    save_with_tokenizer(build("llama"), folder / "model")
    return folder


def planned(saved: Path, average: float | None = None, **settings: Any) -> api.Run:
    text = str(saved / "model/text.txt")
    return api.plan(
        saved / "model",
        **{
            "avg_bits": average,
            "preset": "fast",
            "group_size": 16,
            "calib": text,
            "head_bits": "keep",
            **CALIBRATION,
            **settings,
        },
    )


def spec_of(run: api.Run, name: str) -> QuantSpec:
    spec = run.plan.specs[name]
    assert spec is not None
    return spec


@pytest.mark.parametrize("average", [3.6, 4.0, 5.25, 8.9])
def test_an_average_is_kept_and_used_up(saved: Path, average: float) -> None:
    run = planned(saved, average)
    linears = run.graph.linears
    weights = sum(linear.weights for linear in linears.values())
    taken = sum(spec.stored_bits(linears[name].shape) for name, spec in run.plan.specs.items() if spec) / weights
    assert average - 0.25 < taken <= average
    assert {spec.bits for spec in run.plan.specs.values() if spec} <= set(CANDIDATE_BITS)
    assert any("predicted KL divergence" in note for note in run.report.notes)
    assert all("KL divergence" in why for why in run.plan.why.values())


def test_more_bits_are_predicted_to_lose_less(saved: Path) -> None:
    losses = [float(planned(saved, average).report.notes[-1].split()[-1]) for average in (3.6, 4.5, 6.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_build_has_the_size_that_was_asked_for(saved: Path) -> None:
    report = quantize_saved(saved, bits=4.5, group_size=16, preset="balanced", force=True)
    stored = report.summary()["bits_per_weight"]
    assert 4.25 < stored <= 4.5
    assert quantc.load(saved / "packed") is not None


def test_a_plan_from_the_command_line_is_built_as_it_stands(saved: Path) -> None:
    plan = saved / "plan.yaml"
    model, text = str(saved / "model"), str(saved / "model/text.txt")
    words = ["--calib", text, "--samples", "4", "--seq-len", "32"]
    result = run_command("plan", model, "--avg-bits", "4.5", "--group-size", "16", "-o", str(plan), *words)
    assert result.exit_code == 0, result.stderr
    assert "--calib" in result.stdout.partition("Next")[2]
    again = run_command("plan", model, "--avg-bits", "4.5", "--group-size", "16", "-o", str(plan), *words)
    assert again.exit_code == 2
    assert "pass --force to replace it" in again.stderr
    specs = read_plan(plan).specs
    assert len({spec.bits for spec in specs.values() if spec}) > 1
    quantize_saved(saved, plan=plan, force=True)
    built = CheckpointReader(saved / "packed").entries
    assert {name: entry.spec for name, entry in built.items()} == specs


def test_what_cannot_be_met_is_refused_with_what_can(saved: Path) -> None:
    with pytest.raises(
        UsageError, match=r"an average of 2\.5 bits cannot be met: the smallest plan takes 3\.\d+ .*; ask for 3\."
    ):
        planned(saved, 2.5)
    with pytest.raises(UsageError, match="--calib is none; pass --bits, or another --calib"):
        quantc.quantize(saved / "model", avg_bits=4.0, calib="none", out=saved / "none")
    with pytest.raises(UsageError, match="one of them decides; remove the other"):
        quantc.quantize(saved / "model", bits=3.5, avg_bits=4.0, out=saved / "none")
    assert not (saved / "none").exists()
    result = run_command("plan", str(saved / "model"), "--avg-bits", "4", "-o", str(saved / "nowhere/plan.yaml"))
    assert result.exit_code == 2
    assert "the folder" in result.stderr


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6])
def test_a_size_is_used_up_and_never_exceeded(saved: Path, share: float) -> None:
    whole = sum(file.stat().st_size for file in (saved / "model").glob("*.safetensors"))
    limit = int(whole * share)
    report = quantize_saved(saved, size=limit, preset="balanced", head_bits="keep", force=True)
    files = list((saved / "packed").glob("*.safetensors"))
    assert report.weights_bytes == sum(file.stat().st_size for file in files)
    assert 0.985 * limit < report.weights_bytes <= limit


def test_sizes_are_text_too_and_the_smallest_is_named_when_one_cannot_be_met(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"a size of 1\.02 kB cannot be met: .* ask for (\d+) bytes or more") as caught:
        planned(saved, size="1KiB", group_size=None)
    least = int(str(caught.value).partition("ask for ")[2].split()[0])
    assert planned(saved, size=least, group_size=None).plan.specs
    with pytest.raises(UsageError, match="cannot be met"):
        planned(saved, size=least - 1, group_size=None)


def test_the_embedding_and_the_head_take_part_where_they_are_asked_to(saved: Path) -> None:
    with pytest.raises(UsageError, match="or quantize the embedding and the head too") as caught:
        planned(saved, size="1KiB")
    limit = int(str(caught.value).partition("ask for ")[2].split()[0]) - 1  # too small with the tables as they are
    report = quantize_saved(saved, size=limit, head_bits="auto", preset="balanced", force=True)
    assert 0.97 * limit < report.weights_bytes <= limit
    entries = CheckpointReader(saved / "packed").entries
    run = planned(saved, size=limit, head_bits="auto")
    assert set(run.graph.outside_weights) & set(entries)
    assert all("KL divergence" in run.plan.why[name] for name in run.graph.outside_weights)
    assert run.plan.specs.keys() == {*run.graph.linears, *run.graph.outside_weights}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"avg_bits": 4.0}, "--head-bits auto chooses within a size"),
        ({"size": "100kB", "search": 2}, "--search looks at the blocks alone"),
    ],
)
def test_an_automatic_head_needs_a_size_to_share_out(saved: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(saved, head_bits="auto", **settings)
    with pytest.raises(UsageError, match="the curve averages bits over the blocks alone"):
        api.pareto(saved / "model", head_bits="auto", calib=str(saved / "model/text.txt"))


def test_a_model_that_fits_below_its_size_is_kept(saved: Path) -> None:
    assert set(planned(saved, size="1GB").plan.specs.values()) == {None}


def test_pins_and_formats_hold(saved: Path) -> None:
    run = planned(saved, 10.5, pins={"*.0.*": 8, "*.0.self_attn.*": 16, "*v_proj": 3})
    for name, spec in run.plan.specs.items():
        if name.endswith("v_proj"):
            assert spec_of(run, name).bits == 3
        elif ".0.self_attn." in name:
            assert spec is None
        elif ".0." in name:
            assert spec_of(run, name).bits == 8
    formats = {"w3g32", "w5grow", "w6grow"}
    run = planned(saved, 5.0, group_size=None, formats=tuple(formats))
    assert {spec.label() for spec in run.plan.specs.values() if spec} <= formats
    uniform = quantize_saved(saved, bits=4, group_size=16, pins={"*o_proj": 8}, force=True)
    assert {item.spec.bits for item in uniform.linears if item.name.endswith("o_proj")} == {8}
    assert {item.spec.bits for item in uniform.linears if not item.name.endswith("o_proj")} == {4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pins": {"*w_proj": 4}}, "--pin '\\*w_proj' fits no layer"),
        (
            {"pins": {"*": 7}},
            "cannot have the 7 bits .* of the formats allowed there are 2, 3, 4, 5, 6, 8, and 16 to keep",
        ),
        (
            {"pins": {"*": 8, "*q_proj": 4}, "target": "vllm", "group_size": 32},
            r"q_proj and what is fused with it \(3 linears, stored alike\) cannot have the 4 and 8 bits",
        ),
        ({"formats": ("w5g16",)}, "the smallest plan within the pins and formats given takes 6"),
        ({"pins": {"*": 12}}, "--pin \\*=12 is out of range; pass 2 to 8 bits, or 16 for"),
        (
            {"pins": {"*": 3}, "formats": ("w4g16",)},
            "q_proj cannot have the 3 bits that it is pinned to: of the formats allowed there are 4, and 16",
        ),
        ({"pins": {"*": 8}}, "an average of 4 bits cannot be met: the smallest plan within the pins .* takes 9"),
        (
            {"formats": ("w4g16", "w4g17")},
            "no layer can be stored as w4g17; choose from the [0-9]+ formats .*, such as .*w4g16",
        ),
        ({"target": "ollama"}, "--target 'ollama' is unknown; choose one of gguf, vllm"),
        ({"target": "vllm", "formats": ("w3g16",)}, "vllm does not load w3g16; it loads w3g32"),
        ({"size": "12 parsecs"}, "'12 parsecs' is no size; 300MiB"),
        ({"size": "1MB"}, "--avg-bits and --size are two budgets"),
        ({"avg_bits": 17.0}, "averages are above 0 and at most 16"),
        ({"bits": 4}, "--bits is 4 and --avg-bits is 4.0, but one of them decides; remove the other"),
    ],
)
def test_contradictions_are_refused(saved: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(saved, **{"avg_bits": 4.0, **settings})


def test_targets_that_cannot_rotate_leave_the_pass_out() -> None:
    job = Job.of({"bits": 4, "target": "vllm", "preset": "balanced"}, None, "cpu", None)
    assert [item.name for item in job.passes] == ["allocate", "quantize"]
    assert any("rotate was left out: vllm cannot rotate inputs" in note for note in job.notes)
    job = Job.of({"bits": 4, "preset": "balanced"}, None, "cpu", None)
    assert "rotate" in [item.name for item in job.passes]


def test_an_option_replaces_the_budget_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\npasses: [allocate: {avg_bits: 3.5}, quantize]\n")
    for setting in ({"bits": 4}, {"avg_bits": 4.0}, {"size": "1MB"}):
        job = Job.of({"recipe": tmp_path / "recipe.yaml", **setting}, None, "cpu", None)  # type: ignore[typeddict-item]
        config = allocation(job.passes)
        assert config is not None
        assert (config.avg_bits, config.size) == (setting.get("avg_bits"), 10**6 if "size" in setting else None)
        assert config.bits == 4
    with pytest.raises(UsageError, match="--bits is 4 and --size is 1MB, but one of them decides; remove the other"):
        Job.of({"bits": 4, "size": "1MB"}, None, "cpu", None)


def test_a_width_for_all_holds_to_the_formats_too(saved: Path) -> None:
    with pytest.raises(UsageError, match="would be stored as w3g16, but only w3g32, .* may be used"):
        quantize_saved(saved, bits=3, group_size=16, target="vllm", force=True)
    report = quantize_saved(saved, bits=4, group_size=32, target="vllm", force=True)
    assert {item.spec.label() for item in report.linears} == {"w4g32"}


def test_a_folder_without_a_name_is_called_by_its_size(saved: Path) -> None:
    passes = Job.of({"size": "300MB"}, None, "cpu", None).passes
    assert default_name("model", passes, Plan()) == "model-quantc-300MB"


def test_a_second_build_starts_anew(saved: Path) -> None:
    settings = {"size": 150_000, "preset": "balanced", "calib": str(saved / "model/text.txt"), **CALIBRATION}
    job = Job.of(settings, None, "cpu", None)  # type: ignore[arg-type]
    reports = [
        job.within(150_000).build(open_model(saved / "model"), saved / f"built-{number}") for number in (1, 2)
    ]  # fmt: skip
    assert reports[0].notes == reports[1].notes
    assert reports[0].linears == reports[1].linears
    assert not job.plan.specs


def test_a_target_gets_what_it_loads_and_fused_linears_alike(saved: Path) -> None:
    run = planned(saved, 6.0, target="vllm", group_size=None)
    blocks = {name.split(".")[2] for name in run.plan.specs}
    for block in blocks:
        of_block = {name: spec for name, spec in run.plan.specs.items() if name.split(".")[2] == block}
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            assert len({spec for name, spec in of_block.items() if name.endswith(fused)}) == 1
    found = {spec for spec in run.plan.specs.values() if spec is not None}
    assert found
    assert all(2 <= spec.bits <= 8 and spec.group_size in (32, 64, 128, -1) for spec in found)


def test_losses_are_measured_once_for_all_budgets(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(saved, 4.25, seed=3)
    monkeypatch.setattr("quantc.passes.allocate.measure", lambda *_: pytest.fail("measured again"))
    again = planned(saved, 4.25, seed=3)
    assert again.plan.specs == first.plan.specs
    assert planned(saved, 5.5, seed=3).plan.specs != first.plan.specs
    assert planned(saved, size="130kB", seed=3).plan.specs
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        planned(saved, 4.25, seed=4)


def test_groups_along_the_outputs_take_part_where_inputs_are_not_rotated(tmp_path: Path) -> None:
    model = first_blocks(TRAINED, 1, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [allocate, group_channels, quantize]\n")
    settings: dict[str, Any] = {
        "avg_bits": 3.5,
        "calib": str(TRAINED.parent / "heldout.txt"),
        "samples": 16,
        "seq_len": 64,
        "head_bits": "keep",
    }
    report = quantc.quantize(model, recipe=recipe, out=tmp_path / "packed", **settings)
    planned_specs = api.plan(model, preset="fast", **settings).plan.specs
    assert {item.name: item.spec for item in report.linears} == planned_specs  # group_channels changed nothing
    assert {spec.grouping for spec in planned_specs.values() if spec} == {"per_oc", "per_ic"}
    rotated = api.plan(model, **settings).plan.specs.values()
    assert all(spec.grouping == "per_oc" for spec in rotated if spec and spec.hadamard)
