"""Rows of two widths from a plan to a checkpoint that runs: dense models and stacks of experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quantc.checkpoint.config import PackedEntry
from quantc.checkpoint.reader import CheckpointReader
from quantc.errors import CheckpointError, UsageError
from quantc.formats import format_of
from quantc.numerics.row_widths import mark_salient
from quantc.plan import Plan, read_plan
from quantc.planning.sizes import weights_bytes
from quantc.runtime.doctor import examine_kernels
from quantc.runtime.modules import install
from quantc.sensitivity import Candidate, Losses
from quantc.sensitivity.salience import Salience
from quantc.sensitivity.wide_rows import with_wide_rows
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import check_runs_as_unpacked, opened_run, quantize_saved, save_with_tokenizer

TOKENS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def mixed_plan(folder: Path) -> Plan:
    """A third of the rows of every linear wide, others for each."""
    run = opened_run(folder)
    for place, (name, linear) in enumerate(run.graph.linears.items()):
        n = linear.shape[0]
        run.plan.specs[name] = QuantSpec(2 + place % 3, 16, symmetric=place % 2 == 1, wide_rows=n // 3)
        run.plan.salience[name] = torch.rand(n, generator=torch.Generator().manual_seed(place))
    return run.plan


@pytest.fixture(params=["llama", "mixtral", "gpt_oss", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)
    save_with_tokenizer(build(request.param), tmp_path / "model")
    return tmp_path


def test_a_plan_is_built_as_it_stands_and_the_model_runs(saved: Path) -> None:
    plan = mixed_plan(saved / "model")
    plan.write(saved / "plan.yaml")
    report = quantize_saved(saved, plan=saved / "plan.yaml")
    reader = CheckpointReader(saved / "packed")
    assert reader.config["quantization_config"]["version"] == 3
    assert {name: entry.spec for name, entry in reader.entries.items()} == plan.specs
    assert report.weights_bytes == weights_bytes(opened_run(saved / "model"), plan.specs)
    assert read_plan(saved / "packed/plan.yaml").specs == plan.specs
    for name, entry in reader.entries.items():
        parts = {part: reader.tensor(f"{name}.{part}") for part in entry.layout()}
        tensor = format_of(entry.spec).unpack(parts, entry.spec, entry.shape)
        marked = mark_salient(plan.salience[name], entry.spec.wide_rows)
        assert tensor.wide is not None
        assert torch.equal(tensor.wide, marked.expand(*entry.leading, -1))
        assert int(tensor.codes[~tensor.wide].max()) < entry.spec.levels <= int(tensor.codes[tensor.wide].max())

    check_runs_as_unpacked(saved / "packed", TOKENS)
    kernels = {group["kernel"] for group in examine_kernels(saved / "packed", "cpu", "float32")["linears"]}
    assert kernels <= {"native", "reference", "native + reference"}


def test_an_edited_plan_keeps_its_rows(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    plan = mixed_plan(tmp_path / "model")
    name = next(iter(plan.specs))
    spec = plan.specs[name]
    assert spec is not None
    text = plan.to_yaml().replace(f"{name}: {{bits: {spec.bits},", f"{name}: {{bits: 5,")
    (tmp_path / "plan.yaml").write_text(text)
    quantize_saved(tmp_path, plan=tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "packed/plan.yaml")
    assert again.specs[name] == replace(spec, bits=5)
    assert torch.equal(again.salience[name][: len(plan.salience[name])], plan.wide_rows(name))


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    run = opened_run(tmp_path / "model")
    name, linear = next(iter(run.graph.linears.items()))
    n = linear.shape[0]
    run.plan.specs.update(dict.fromkeys(run.graph.linears, QuantSpec(3, 16)))
    for rows, message in (
        (n + 8, f"wide of {name} is a mask of {n + 8} rows, but there are {n}; write {n // 4} digits"),
        (n - 8, f"wide of {name} is a mask of {n - 8} rows, but there are {n}"),
    ):
        run.plan.specs[name] = QuantSpec(3, 16, wide_rows=1)
        run.plan.salience[name] = torch.arange(rows)
        with pytest.raises(UsageError, match=message):
            run.plan.check(run.graph, set())
    run.plan.specs[name] = QuantSpec(3, 16, wide_rows=n)
    run.plan.salience[name] = torch.arange(n)
    with pytest.raises(UsageError, match=f"wide of {name} marks all of its {n} rows; leave it out"):
        run.plan.check(run.graph, set())
    run.plan.specs[name] = QuantSpec(3, 16)
    run.plan.specs["model.embed_tokens.weight"] = QuantSpec(3, 16, wide_rows=1)
    with pytest.raises(UsageError, match=r"gives model\.embed_tokens\.weight rows of two widths, but only linears"):
        run.plan.check(run.graph, {"model.embed_tokens.weight"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{bits: 3, wide: xyz}", "wide is 'xyz', but it marks rows in hexadecimal"),
        ("{bits: 3, wide: 1234}", "wide is 1234, but it marks rows in hexadecimal, as text in quotes"),
        ("{bits: 3, wide_rows: 4}", "wide_rows counts the rows that wide marks, and is not written"),
        ("{bits: 8, wide: 'ff00'}", "8 rows have one bit more, which needs per_oc groups and fewer than 8 bits"),
    ],
)
def test_a_mask_that_is_none_is_refused(entry: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(f"version: 1\nlinears:\n  a: {entry}\n")
    with pytest.raises(UsageError, match=message):
        read_plan(tmp_path / "plan.yaml")


def test_a_table_of_two_widths_is_not_loaded() -> None:
    model = build("llama")
    n, k = model.get_input_embeddings().weight.shape
    entry = PackedEntry(QuantSpec(3, 16, wide_rows=1), (n, k))
    with pytest.raises(CheckpointError, match=r"packs model\.embed_tokens\.weight as two-widths, but a table is read"):
        install(model, {"model.embed_tokens.weight": entry})


def test_losses_follow_from_both_widths_by_salience() -> None:
    narrow, wide, apart = QuantSpec(3, 64), QuantSpec(4, 64), QuantSpec(6, 64)
    salience = torch.ones(64)
    salience[5] = 65
    found = with_wide_rows(
        Losses({"a": [Candidate(spec, loss) for spec, loss in ((narrow, 0.8), (wide, 0.2), (apart, 0.01))], "b": []},
               {"a": salience.half()})
    )  # fmt: skip
    losses = {candidate.spec: candidate.loss for candidate in found["a"]}
    assert losses.keys() == {narrow, wide, apart, *(replace(narrow, wide_rows=rows) for rows in (16, 32, 48))}
    assert losses[replace(narrow, wide_rows=16)] == pytest.approx(0.8 + 80 / 128 * (0.2 - 0.8))
    assert found["b"] == []


def test_salience_is_squared_gradient_times_energy() -> None:
    salience = Salience()
    salience.add("a", torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
    salience.add("a", torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    salience.finish("a", [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 5.0])])
    raw = torch.tensor([2.0, 5.0, 10.0])
    torch.testing.assert_close(salience.found["a"].float(), 0.9 * raw / raw.mean() + 0.1, rtol=1e-3, atol=1e-3)
    salience.finish("never seen", [torch.ones(3)])
    salience.add("dead", torch.zeros(1, 3))
    salience.finish("dead", [torch.ones(3)])
    assert salience.found.keys() == {"a"}
