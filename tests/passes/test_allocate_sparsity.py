"""Budgets that may drop weights: where that takes part, and where it must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc import api
from quantc.driver.job import Job
from quantc.errors import UsageError
from quantc.graph.model_graph import Linear
from quantc.numerics.basis import Rounding
from quantc.plan import read_plan
from quantc.planning.budget import stored_bits
from quantc.planning.candidates import of_linear
from quantc.recipe import Recipe
from quantc.sensitivity import Candidate, Losses
from quantc.sensitivity.wide_rows import with_wide_rows
from quantc.spec import QuantSpec
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer, thinned
from tests.quantc.cli_runner import run as run_command

CALIBRATION = {"samples": 4, "seq_len": 32}
SPARSE = tuple(f"w2g32-s{share}" for share in (30, 50, 70))


@pytest.fixture(scope="module", params=thinned(["llama", "mixtral"], every=2))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsity")
    save_with_tokenizer(build(request.param), folder / "model")
    return folder


def planned(saved: Path, **settings: Any) -> api.Run:
    text = str(saved / "model/text.txt")
    return api.plan(
        saved / "model",
        **{"preset": "fast", "sparsity": "auto", "calib": text, "head_bits": "keep", **CALIBRATION, **settings},
    )


def taken(run: api.Run) -> float:
    """Bits a weight."""
    linears = run.graph.linears
    bits = sum(stored_bits(linears[name], spec) for name, spec in run.plan.specs.items() if spec is not None)
    return bits / sum(linear.weights for linear in linears.values())


def sparse(run: api.Run) -> set[str]:
    return {name for name, spec in run.plan.specs.items() if spec is not None and spec.sparse}


@pytest.mark.parametrize("saved", thinned(["mixtral", "llama"], every=2), indirect=True)
def test_an_average_that_dense_weights_cannot_have_is_met_and_built_from_its_plan(saved: Path) -> None:
    with pytest.raises(UsageError, match="an average of 2 bits cannot be met"):
        planned(saved, avg_bits=2.0, sparsity=None)
    run = planned(saved, avg_bits=2.0)
    assert 1.9 < taken(run) <= 2.0
    assert sparse(run)
    report = quantize_saved(saved, avg_bits=2.0, sparsity="auto", force=True)
    assert {item.name: item.spec for item in report.linears} == run.plan.specs
    assert report.bits_per_weight == pytest.approx(taken(run))
    weights = (saved / "packed/model-00001-of-00001.safetensors").read_bytes()
    plan = saved / "packed/plan.yaml"
    assert read_plan(plan).specs == run.plan.specs
    quantize_saved(saved, plan=plan, force=True)
    assert (saved / "packed/model-00001-of-00001.safetensors").read_bytes() == weights
    shown = run_command("inspect", str(saved / "packed"))
    assert any(f"{label} " in shown.stdout for label in SPARSE)


def test_no_linear_takes_part_that_was_not_asked_to() -> None:
    linear = Linear("a", "linear", (64, 96), "x")
    dense, wider = (of_linear(QuantSpec(hadamard=32), linear, True, sparse) for sparse in (False, True))
    assert not any(spec.sparse for spec in dense)
    assert wider[: len(dense)] == dense
    dropped = {spec.label().removesuffix("-had") for spec in wider[len(dense) :]}
    assert dropped == {*SPARSE, "w4grow-2:4"}
    eights = of_linear(QuantSpec(group_size=8), linear, False, True)
    assert {spec.group_size for spec in eights} == {8}
    assert sum(spec.sparsity > 0 for spec in eights) == len(SPARSE)
    long = of_linear(QuantSpec(group_size=48), linear, False, True)
    assert {spec.label() for spec in long if spec.sparse} == {"w4g48-2:4"}  # groups of 48 cannot be dropped


def test_pins_have_all_of_their_weights_and_formats_may_name_what_drops_some(saved: Path) -> None:
    run = planned(saved, avg_bits=3.0, pins={"*.0.*": 2})
    assert sparse(planned(saved, avg_bits=2.0))
    assert not {name for name in sparse(run) if ".0." in name}
    run = planned(saved, avg_bits=3.0, formats=("w2g32-s50", "w2g32"))
    assert {spec and spec.label() for spec in run.plan.specs.values()} <= {None, "w2g32-s50", "w2g32"}
    assert sparse(planned(saved, avg_bits=2.0, formats=("w2g32-s50", "w2g32")))
    with pytest.raises(UsageError, match="no layer can be stored as w2g32-s40; .* and --sparsity allow"):
        planned(saved, avg_bits=3.0, formats=("w2g32-s40",))


def test_sizes_and_searches_have_it_too(saved: Path) -> None:
    run = planned(saved, avg_bits=2.0, search=1)
    assert 1.9 < taken(run) <= 2.0
    assert any(note.startswith("search: KL divergence") for note in run.report.notes)
    smallest = []
    for sparsity in (None, "auto"):
        with pytest.raises(UsageError, match="ask for") as caught:
            planned(saved, size="1KiB", sparsity=sparsity)
        smallest.append(int(str(caught.value).partition("ask for ")[2].split()[0]))
    assert smallest[1] < smallest[0]
    report = quantize_saved(saved, size=smallest[1], sparsity="auto", force=True)
    assert {item.spec.label() for item in report.linears} == {"w2g32-s70"}
    assert report.weights_bytes <= smallest[1]


@pytest.mark.parametrize("estimator", thinned(["gram", "kl"], every=2))
def test_other_estimators_rate_it(estimator: str, saved: Path) -> None:
    recipe = Recipe.from_dict({"version": 1, "passes": [{"allocate": {"estimator": estimator}}, "quantize"]})
    assert sparse(planned(saved, avg_bits=2.0, preset=None, recipe=recipe))


def test_losses_are_those_of_what_is_stored_within_the_sample() -> None:
    """Of 24 channels a sample of 8 keeps half of its own groups, after the fit, the feedback and the refit."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=random)
    rows = torch.randn(256, 64, generator=random) @ torch.randn(64, 64, generator=random)
    spec = QuantSpec(2, 16, sparsity=0.5)
    basis = Rounding().basis(rows.T @ rows, 256, 0, 2)
    several = basis.round_each(weight[:8], [QuantSpec(3, 16), spec, replace(spec, bits=4), QuantSpec(2, 32)])
    for tensor in several:
        assert torch.equal(tensor.dequantize(), basis.round(weight[:8], tensor.spec).dequantize())
    kept, wider = several[1].kept, several[2].kept
    assert kept is not None
    assert wider is not None
    assert int(kept.sum()) == 16
    assert torch.equal(kept, wider)  # the pattern is one for all widths


def test_rows_of_two_widths_are_dense() -> None:
    specs = [QuantSpec(2, 16), QuantSpec(3, 16), *(QuantSpec(bits, 16, sparsity=0.5) for bits in (2, 3))]
    losses = Losses({"a": [Candidate(spec, 1.0 / spec.bits) for spec in specs]}, {"a": torch.ones(64).half()})
    mixed = [item.spec for item in with_wide_rows(losses)["a"] if item.spec.wide_rows]
    assert mixed
    assert not any(spec.sparse for spec in mixed)


def test_losses_are_kept_on_disk(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(saved, avg_bits=2.0, seed=5)
    monkeypatch.setattr("quantc.passes.allocate.measure", lambda *_: pytest.fail("measured again"))
    assert planned(saved, avg_bits=2.0, seed=5).plan.to_yaml() == first.plan.to_yaml()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "vllm"}, "vllm cannot load layers with dropped weights; remove --sparsity"),
        ({"sparsity": 0.5}, "layer by layer, and the pass sparsify drops weights .* or --sparsity auto instead"),
        ({"sparsity": "2:4"}, "layer by layer, and the pass sparsify drops weights"),
        (
            {"recipe": Recipe.from_dict({"version": 1, "passes": ["allocate", "sparsify", "quantize"]})},
            "layer by layer, and the pass sparsify drops weights",
        ),
    ],
)
def test_what_cannot_be_had_together_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Job.of({"avg_bits": 3.0, "sparsity": "auto", **settings}, None, "cpu", None)  # type: ignore[typeddict-item]


def test_it_needs_a_budget_and_groups_along_the_inputs(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sparsity auto chooses within a budget, and there is none"):
        quantize_saved(saved, bits=4, sparsity="auto", force=True)
    with pytest.raises(
        UsageError, match="--sparsity auto drops weights in per_oc groups, and the recipe has per_ic ones"
    ):
        Recipe.from_dict({"version": 1, "passes": [{"allocate": {"sparsity": "auto", "grouping": "per_ic"}}]})
    (tmp_path / "plan.yaml").write_text("version: 1\nlinears:\n  a: {bits: 3}\n")
    with pytest.raises(UsageError, match="how every layer is stored; remove --sparsity, or edit the plan"):
        Job.of({"sparsity": "auto"}, tmp_path / "plan.yaml", "cpu", None)
