"""Dropped groups from a setting or a plan to a checkpoint that runs: dense models and stacks of experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import PreTrainedTokenizerFast

import quantc
from quantc.checkpoint.config import PackedEntry, describe_quantization, read_quantization
from quantc.checkpoint.reader import CheckpointReader
from quantc.cli import main
from quantc.driver.job import Job
from quantc.driver.settings import default_name
from quantc.errors import CheckpointError, UsageError
from quantc.formats import format_of
from quantc.kernels.cpu import library
from quantc.plan import Plan, read_plan
from quantc.planning.sizes import weights_bytes
from quantc.recipe import Recipe
from quantc.runtime.doctor import examine_kernels
from quantc.runtime.modules import install
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import check_runs_as_unpacked, opened_run, quantize_saved, save_with_tokenizer

TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def sparse_plan(folder: Path) -> Plan:
    """Every linear as sparse as its place says; the first is dense, some keep two of four weights, some nothing."""
    run = opened_run(folder)
    for place, name in enumerate(run.graph.linears):
        sparsity = (0.0, 0.5, 0.25, 0.7, 1.0)[place % 5]
        spec = QuantSpec(2 + place % 3, (8, 16)[place % 2], symmetric=place % 2 == 1)
        run.plan.specs[name] = replace(spec, sparsity=sparsity) if sparsity else replace(spec, two_of_four=place > 0)
    return run.plan


@pytest.fixture(params=["llama", "mixtral", "gpt_oss", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)
    save_with_tokenizer(build(request.param), tmp_path / "model")
    return tmp_path


def test_a_plan_is_built_as_it_stands_and_the_model_runs(saved: Path) -> None:
    plan = sparse_plan(saved / "model")
    plan.write(saved / "plan.yaml")
    report = quantize_saved(saved, plan=saved / "plan.yaml")
    reader = CheckpointReader(saved / "packed")
    assert reader.config["quantization_config"]["version"] == 3
    assert {name: entry.spec for name, entry in reader.entries.items()} == plan.specs
    assert report.weights_bytes == weights_bytes(opened_run(saved / "model"), plan.specs) == reader.weights_bytes()
    assert read_plan(saved / "packed/plan.yaml").specs == plan.specs
    for name, entry in reader.entries.items():
        parts = {part: reader.tensor(f"{name}.{part}") for part in entry.layout()}
        kept = format_of(entry.spec).unpack(parts, entry.spec, entry.shape).kept
        assert (kept is None) != entry.spec.sparse
        if entry.spec.sparsity:
            assert kept is not None
            assert set(kept.flatten(-2).sum(-1).flatten().tolist()) == {entry.spec.kept_groups(entry.shape)}

    shown = json.loads(CliRunner().invoke(main, ["inspect", str(saved / "packed"), "--json"]).stdout)["linears"]
    assert {item["name"]: QuantSpec.from_dict(item["spec"]) for item in shown} == plan.specs
    for item in shown:
        entry = reader.entries[item["name"]]
        stored = sum(reader.tensor(f"{item['name']}.{part}").nbytes for part in entry.layout())
        assert item["bits_per_weight"] * entry.weights == pytest.approx(8 * stored, abs=0.5)  # to the bit

    check_runs_as_unpacked(saved / "packed", TOKENS)
    sparse = [
        group for group in examine_kernels(saved / "packed", "cpu", "float32")["linears"] if "-s" in group["label"]
    ]
    assert {group["kernel"] for group in sparse} == {"reference" if isinstance(library.load(), str) else "native"}


@pytest.mark.parametrize("calib", [None, "none"])
def test_a_sparsity_is_a_setting(calib: str | None, tmp_path: Path) -> None:
    folder = save_with_tokenizer(build("llama"), tmp_path / "model")
    report = quantc.quantize(
        folder, out=tmp_path / "packed", preset="fast", bits=4, sparsity=0.5, calib=calib or str(folder / "text.txt"),
        samples=4, seq_len=32,
    )  # fmt: skip
    assert {linear.spec for linear in report.linears} == {QuantSpec(4, 16, sparsity=0.5)}
    assert {linear.method for linear in report.linears} == {"gptq" if calib is None else "rtn"}
    assert any("no sparsity are recommended" in note for note in report.notes)
    stored = report.bits_per_weight
    assert stored == CheckpointReader(tmp_path / "packed").bits_per_weight()
    assert 2.68 < stored < 2.9
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "packed")], env={"COLUMNS": "200"})
    assert "w4g16-s50" in shown.output
    page = CliRunner().invoke(main, ["report", str(tmp_path / "packed")])
    assert page.exit_code == 0
    assert "w4g16-s50" in (tmp_path / "packed/report.html").read_text()


def test_groups_of_another_length_and_the_name_of_the_folder() -> None:
    job = Job.of({"bits": 3, "sparsity": 0.25, "group_size": 8}, None, "cpu", None)
    assert [name for name, _ in job.recipe.passes] == ["allocate", "rotate", "sparsify", "quantize"]
    assert default_name("tiny", job.passes, job.plan) == "tiny-quantc-w3g8-s25"
    two = Job.of({"bits": 4, "sparsity": "2:4"}, None, "cpu", None)
    assert default_name("tiny", two.passes, two.plan) == "tiny-quantc-w4g128-2:4"
    assert Recipe.from_dict(yaml.safe_load(two.recipe.to_yaml())) == two.recipe


def test_a_setting_replaces_what_the_recipe_says() -> None:
    recipe = Recipe.from_dict({"version": 1, "passes": ["allocate", {"sparsify": {"group_size": 32}}, "quantize"]})
    settings = dict(Job.of({"recipe": recipe, "sparsity": 0.4}, None, "cpu", None).recipe.passes)["sparsify"]
    assert (settings.sparsity, settings.group_size) == (0.4, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "sparsity": 1}, "sparsity is 1, but a share above 0 and below 1 is dropped"),
        ({"bits": 4, "sparsity": 0.5, "group_size": 64}, "needs per_oc groups of 8, 16, 32, not per_oc ones of 64"),
        ({"avg_bits": 3.5, "sparsity": 0.5}, "layer by layer, and the pass sparsify drops weights"),
        ({"bits": 4, "sparsity": 0.5, "target": "vllm"}, "vllm cannot load layers with dropped weights"),
    ],
)
def test_what_cannot_be_had_together_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Job.of(settings, None, "cpu", None)


def test_a_plan_that_is_handed_in_stays(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("version: 1\nlinears:\n  a: {bits: 3, group_size: 16, sparsity: 0.5}\n")
    assert read_plan(tmp_path / "plan.yaml").specs == {"a": QuantSpec(3, 16, sparsity=0.5)}
    with pytest.raises(UsageError, match="how every layer is stored; remove --sparsity, or edit the plan"):
        Job.of({"sparsity": 0.5}, tmp_path / "plan.yaml", "cpu", None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{sparsity: 1.5, group_size: 16}", "sparsity is 1.5, but it is a share of the groups"),
        ("{sparsity: true, group_size: 16}", "sparsity is True, but it is a share of the groups"),
        ("{sparsity: 0.5, group_size: 16, grouping: per_ic}", "not per_ic ones of 16"),
        ("{bits: 3, group_size: 16, sparsity: 0.5, wide: 'ff00'}", "50% of the groups are dropped and 8 rows have one"),
    ],
)
def test_a_sparsity_that_is_none_is_refused(entry: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"version: 1\nlinears:\n  a: {entry}\n")
    with pytest.raises(UsageError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_a_sparse_table_is_neither_planned_nor_loaded(tmp_path: Path) -> None:
    model, table, spec = build("llama"), "model.embed_tokens.weight", QuantSpec(4, 16, sparsity=0.5)
    n, k = model.get_input_embeddings().weight.shape
    with pytest.raises(CheckpointError, match="as group-sparse, but a table is read row by row, which needs dense"):
        install(model, {table: PackedEntry(spec, (n, k))})
    save_with_tokenizer(build("llama"), tmp_path / "model")
    plan = sparse_plan(tmp_path / "model")
    plan.specs[table] = spec
    with pytest.raises(UsageError, match="a rotation, a rank or a sparsity, but only linears inside the blocks"):
        plan.check(opened_run(tmp_path / "model").graph, {table})


def test_dense_weights_beside_a_sparse_default_stay_dense() -> None:
    sparse = QuantSpec(4, 16, sparsity=0.5)
    entries = {"a": PackedEntry(sparse, (32, 64)), "b": PackedEntry(replace(sparse, sparsity=0.0), (32, 64))}
    described = describe_quantization(entries, sparse)
    assert read_quantization({"quantization_config": described}) == entries
    with pytest.raises(CheckpointError, match="a has dropped weights, in version 1"):
        read_quantization({"quantization_config": {**described, "version": 1}})
