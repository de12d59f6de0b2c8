"""The curve of quality against size: points, files, verified builds, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

import quantc
from quantc import api
from quantc.errors import UsageError
from quantc.pages import pareto_page, plots
from quantc.plan import Plan
from quantc.planning.budget import Budget
from quantc.planning.pareto import NEGLIGIBLE, POINTS, Curve, Point, readable_between, spaced, spread
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run as run_command
from tests.quantc.pages.test_report_page import Page

CALIBRATION: dict[str, Any] = {"samples": 4, "seq_len": 32}
WORDS = ["--samples", "4", "--seq-len", "32", "--group-size", "16"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_tokenizer(build("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def verified(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """With two points built."""
    out = tmp_path_factory.mktemp("curve") / "new"
    return traced(saved, out, verify=2, text=str(saved / "text.txt"), preset="balanced", head_bits=8)


def traced(saved: Path, out: Path, **settings: Any) -> Curve:
    return api.pareto(saved, out=out, calib=str(saved / "text.txt"), **{"group_size": 16, **CALIBRATION, **settings})


def made_up(average: float) -> Point:
    """Loses a fifth for every bit, and ten times as much below 3."""
    loss = 5.0**-average * (10 if average < 3 else 1)
    return Point(f"--avg-bits {average:g}", average, int(1e6 * average), loss, {}, Plan())


# Points


def test_points_lie_densest_where_the_curve_is_steepest() -> None:
    points = spread(made_up, 2.28, 8.75)
    averages = [point.bits_per_weight for point in points]
    assert len(points) == POINTS
    assert (averages[0], averages[-1]) == (2.28, 8.75)
    assert averages == sorted(averages)
    assert min(right - left for left, right in pairwise(averages)) < 0.15
    assert sum(2.5 <= average <= 3 for average in averages) > sum(5 <= average <= 5.5 for average in averages)
    last_but_one = points[-2]
    assert last_but_one.bits_per_weight < 6.5
    assert last_but_one.predicted_kl > NEGLIGIBLE / 10


def test_an_average_counts_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """As floats, 2.3 times 100 is less than 230."""
    monkeypatch.setattr(Budget, "share", lambda self, bits: bits)
    budget = Budget.__new__(Budget)
    budget.weights = 100
    assert budget.share_average(2.3) == 230


def test_a_curve_of_few_plans_has_few_points() -> None:
    steps = spread(lambda average: made_up(round(average)), 2, 5)
    assert [point.bits_per_weight for point in steps] == [2, 3, 4, 5]
    assert len(spread(made_up, 4.5, 4.5)) == 1


@pytest.mark.parametrize(
    ("low", "high", "middle"),
    [(2.13, 8.75, 5), (2.13, 5, 4), (3, 4, 3.5), (3, 3.5, 3.25), (3, 3.25, 3.1), (3.1, 3.12, 3.11), (3.1, 3.11, None)],
)
def test_averages_are_round_numbers(low: float, high: float, middle: float | None) -> None:
    assert readable_between(low, high) == middle


def test_verified_points_are_spread_over_the_curve() -> None:
    assert spaced(16, 1) == [8]
    assert spaced(16, 3) == [2, 8, 13]
    assert spaced(3, 9) == [0, 1, 2]
    assert spaced(16, 0) == []


def test_more_bits_are_predicted_to_lose_less(verified: Curve) -> None:
    points = verified.points
    assert len(points) > 8
    for smaller, larger in pairwise(points):
        assert smaller.bits_per_weight < larger.bits_per_weight
        assert smaller.weights_bytes < larger.weights_bytes
        assert smaller.predicted_kl > larger.predicted_kl
    for point in points:
        assert point.bits_per_weight <= float(point.option.removeprefix("--avg-bits "))
        assert sum(point.widths.values()) == pytest.approx(1)


def test_a_build_has_the_predicted_bytes(verified: Curve) -> None:
    built = [(point, point.measured) for point in verified.points if point.measured]
    assert len(built) == 2
    for point, measured in built:
        assert measured.weights_bytes == point.weights_bytes
        assert measured.kl > 0
        assert measured.perplexity_original == built[0][1].perplexity_original
    assert built[0][1].kl > built[1][1].kl
    assert sorted(file.name for file in verified.files[0].parent.iterdir()) == ["pareto.html", "pareto.png"]


def test_a_point_is_what_its_option_builds(saved: Path, tmp_path: Path) -> None:
    curve = traced(saved, tmp_path / "curve")
    settings = {"group_size": 16, "calib": str(saved / "text.txt"), **CALIBRATION}
    point = curve.points[len(curve.points) // 2]
    average = float(point.option.removeprefix("--avg-bits "))
    assert api.plan(saved, avg_bits=average, **settings).plan.specs == point.plan.specs
    for uniform in curve.uniform:
        bits = int(uniform.option.removeprefix("--bits "))
        assert uniform.widths == {bits: 1.0}
        as_large = [point for point in curve.points if point.bits_per_weight >= uniform.bits_per_weight]
        assert (as_large or curve.points[-1:])[0].predicted_kl <= uniform.predicted_kl
    assert len(curve.uniform) == 6
    three = quantc.quantize(saved, bits=3, out=tmp_path / "three", **settings)
    assert three.weights_bytes == curve.uniform[1].weights_bytes


def test_losses_are_measured_once(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = traced(saved, tmp_path, seed=3)
    monkeypatch.setattr("quantc.passes.allocate.measure", lambda *_: pytest.fail("measured again"))
    again = traced(saved, tmp_path, seed=3, force=True)
    assert again.to_dict() == first.to_dict()
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        traced(saved, tmp_path, seed=4, force=True)


def test_pins_formats_and_the_recipe_hold_but_not_its_budget(saved: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [{allocate: {avg_bits: 5, formats: [w3g16, w5g16, w8g16]}}, quantize]\n")
    curve = traced(saved, tmp_path / "curve", recipe=recipe, pins={"*v_proj": 16, "*o_proj": 8})
    assert [point.option for point in curve.uniform] == ["--bits 3", "--bits 5", "--bits 8"]
    for point in (*curve.points, *curve.uniform):
        assert set(point.widths) <= {3, 5, 8, 16}
        specs = point.plan.specs
        assert {spec for name, spec in specs.items() if name.endswith("v_proj")} == {None}
        assert {spec.bits for name, spec in specs.items() if spec and name.endswith("o_proj")} == {8}


# Files


def test_the_page_has_every_figure_and_loads_nothing(verified: Curve) -> None:
    text = verified.files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("tr") == 2 + len(verified.points) + len(verified.uniform)
    assert page.tags.count("svg") == 1
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert all(value and value.startswith("#") for name, value in page.attributes if name.endswith(("src", "href")))
    for point in verified.points:
        assert f"<td>{point.option}</td>" in text
        assert f">{pareto_page.size(point.weights_bytes)}</td>" in text
    for point in verified.verified:
        assert point.measured
        assert f">{pareto_page.number(point.measured.kl)}</td>" in text
    assert f"perplexity {pareto_page.number(point.measured.perplexity_original, 4)}." in text
    assert "KL divergence to the original (nats per token)" in text
    assert not any(colour in text[text.index("<svg") :] for colour in pareto_page.THEMED)


def test_the_plot_shows_what_there_is(verified: Curve) -> None:
    pixels = matplotlib.image.imread(verified.files[1])
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 900
    for colour in (plots.MIXED, plots.VERIFIED, plots.UNIFORM):
        wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        assert (abs(pixels[..., :3] - wanted).max(axis=-1) < 0.01).sum() > 50


def test_a_model_with_dollars_in_its_name_and_one_point_are_drawn(tmp_path: Path) -> None:
    curve = Curve("<b>$a_$", [made_up(4.0)], [])
    pareto_page.write(curve, tmp_path)
    assert "&lt;b&gt;$a_$" in curve.files[0].read_text()
    assert "<b>" not in curve.files[0].read_text()


def test_without_matplotlib_there_is_a_page_and_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    curve = Curve("tiny", [made_up(3.0), made_up(4.0)], [])
    pareto_page.write(curve, tmp_path)
    assert [file.name for file in curve.files] == ["pareto.html"]
    assert curve.notes == ["no plot was drawn, as matplotlib is not installed; run `pip install matplotlib` for one."]
    page = curve.files[0].read_text()
    assert "pip install matplotlib" in page
    assert "<svg" not in page


# The command


def test_the_command_prints_the_table_and_what_to_type_next(saved: Path, tmp_path: Path) -> None:
    words = [str(saved), "--calib", str(saved / "text.txt"), *WORDS, "--pin", "*v_proj=8", "--asymmetric"]
    shown = run_command("pareto", *words, "-o", str(tmp_path / "new"))
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith(f"Wrote {tmp_path / 'new/pareto.html'} and {tmp_path / 'new/pareto.png'}\n")
    assert "to build it" in shown.stdout
    assert "--bits 4 " in shown.stdout
    following = shown.stdout.rpartition("\n  quantc quantize ")[2]
    assert "--avg-bits " in following
    for wanted in ("--pin '*v_proj=8'", "--asymmetric", "--group-size 16", "--seq-len 32", "--calib"):
        assert wanted in following
    again = run_command("pareto", *words, "-o", str(tmp_path / "new"))
    assert again.exit_code == 2
    assert "pareto.html exists; pass --force to replace it, or another --out." in again.stderr
    for name in ("pareto.html", "pareto.png"):
        written = (tmp_path / "new" / name).read_bytes()
        (tmp_path / "new" / name).write_text("irreplaceable")
        other = run_command("pareto", *words, "-o", str(tmp_path / "new"), "--force")
        assert f"{tmp_path / 'new' / name} exists, and quantc did not write it; pass another --out." in other.stderr
        (tmp_path / "new" / name).write_bytes(written)
    content = json.loads(run_command("pareto", *words, "-o", str(tmp_path / "new"), "--force", "--json").stdout)
    assert content["files"] == [str(tmp_path / "new/pareto.html"), str(tmp_path / "new/pareto.png")]
    assert len(content["points"]) > 8
    assert {"option", "bits_per_weight", "weights_bytes", "predicted_kl", "widths", "measured"} == set(
        content["points"][0]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"avg_bits": 4.0}, "every size is looked at, so --avg-bits changes nothing; remove it"),
        ({"bits": 4}, "so --bits changes nothing"),
        ({"verify": 1}, "--verify measures points on a text, and there is none; pass --text too"),
        ({"text": "a.txt"}, "--text is for points that --verify builds, and there are none; pass --verify too"),
        ({"verify": 1, "text": "nowhere.text"}, "neither a known name nor a file"),
        ({"calib": "none"}, "and --calib is none"),
        ({"pins": {"*w_proj": 4}}, "fits no layer"),
        ({"out": "text.txt"}, "text.txt is a file, but the curve needs a folder; pass another --out"),
        ({"out": "text.txt/more"}, "text.txt is a file, but the curve needs a folder; pass another --out"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("quantc.passes.allocate.measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "text.txt").write_text("text")
    out = tmp_path / settings.get("out", "new")
    given = {"calib": str(saved / "text.txt"), "seed": 9, **CALIBRATION, **settings, "out": out}
    with pytest.raises(UsageError, match=message) as caught:
        api.pareto(saved, **given)
    assert str(caught.value).count("\n") == 0
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]
