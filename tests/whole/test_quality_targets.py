"""Quality targets on a model: met by measuring, and closely; what contradicts is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quantc
from quantc.checkpoint.reader import CheckpointReader, verify
from quantc.driver import quality
from quantc.driver.builds import Builds
from quantc.driver.quality import BUILDS, HELD_OUT_SHARE, Round, Target, bracket, held_out, is_wide
from quantc.errors import UsageError
from quantc.planning.budget import Shared
from quantc.report import Report, read_report
from quantc.spec import QuantSpec
from tests.helpers import first_blocks, thinned

MODEL = Path(__file__).parent.parent / "tiny_model" / "model"
TEXT = MODEL.parent / "heldout.txt"


@pytest.mark.parametrize("samples", [8, 20, 64])
def test_an_eighth_of_the_windows_is_kept_aside(samples: int) -> None:
    tokens = torch.arange(samples * 4).reshape(samples, 4)
    kept, windows = held_out(None, tokens, None)  # type: ignore[arg-type]
    aside = torch.stack([window.tokens for window in windows])
    assert len(aside) == pytest.approx(samples / HELD_OUT_SHARE, abs=0.6)
    assert sorted([*kept.flatten().tolist(), *aside.flatten().tolist()]) == list(range(samples * 4))


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Round]:
    """The builds of a quality target of a test, the best one last."""
    found: list[Round] = []

    def best_last(*arguments: Any) -> list[Round]:
        found[:] = quality.best_last(*arguments)
        return found

    monkeypatch.setattr("quantc.driver.builds.best_last", best_last)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_blocks(MODEL, 2, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def two_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no build decides needs no more of them."""
    monkeypatch.setattr(quality, "BUILDS", 2)


@pytest.mark.parametrize("wanted", thinned([{"max_kl": 0.03}, {"max_ppl_increase": 0.02}], every=2))
def test_a_model_meets_its_target(wanted: dict[str, float], model: Path, tmp_path: Path, rounds: list[Round]) -> None:
    settings = {"calib": str(TEXT), "samples": 16, "seq_len": 64, **wanted}
    report = quantc.quantize(model, out=tmp_path / "out", text=str(TEXT), **settings)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    verify(tmp_path / "out")
    assert read_report(tmp_path / "out")["notes"][-1] == report.notes[-1]
    assert f"\nMeasured: {report.notes[-1]}.\n" in (tmp_path / "out/README.md").read_text()
    figures = [float(word) for word in report.notes[-1].replace(",", "").split() if word[0].isdigit()]
    scale = 1 if "max_kl" in wanted else 100
    assert figures[0] <= figures[1] == pytest.approx(scale * next(iter(wanted.values())))
    limit = Target(**wanted).limit
    met, missed = bracket(rounds, limit)
    assert met is rounds[-1]
    assert len(rounds) == BUILDS or not is_wide(limit, met, missed)
    found = quantc.evaluate(tmp_path / "out", text=str(TEXT), against=model, context=64, windows=32)
    assert found.mean_kl is not None
    assert found.perplexity_original is not None
    increase = 100 * (found.perplexity / found.perplexity_original - 1)
    assert figures[0] == pytest.approx(found.mean_kl if "max_kl" in wanted else increase, rel=1e-2)


class Place:
    """A folder with a journal, of which a run may not come back from the fourth save."""

    def __init__(self, folder: Path, saves: int = 99):
        self.folder, self.saves, self.state = folder, saves, {}

    def save(self, done: str, state: dict[str, Any]) -> None:
        self.state, self.saves = json.loads(json.dumps(state)), self.saves - 1
        if not self.saves:
            raise KeyboardInterrupt


@pytest.mark.parametrize("saves", [1, 2, 3, 4, 5, 99])
def test_of_the_builds_only_the_best_stays_and_none_is_made_again(
    saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantc.driver.builds._is_whole", Path.exists)
    losses = [0.3, 0.001, 0.5, 0.02, 0.2]  # missed and met in turn
    plans: list[Any] = [
        SimpleNamespace(predicted=Shared({"a": QuantSpec(4), f"{bits}": None}, {}, bits))
        for bits in (30, 60, 40, 50, 45)
    ]
    written: list[Path] = []

    def write(_: object, folder: Path) -> Report:
        assert len(list(tmp_path.iterdir())) <= 2  # the best one so far, and one that was interrupted while removed
        folder.mkdir()
        (folder / "config.json").write_text('{"quantization_config": {"quant_method": "quantc"}}', encoding="utf-8")
        report = Report("tiny", str(folder))
        report.write(folder)
        written.append(folder)
        return report

    def found(folder: Path) -> float:
        return losses[int(folder.name.removeprefix("build-")) - 1]

    def builds(place: Place, measured: list[dict[str, Any]]) -> Builds:
        return Builds(place, Target(max_kl=0.1), measured, write, found)  # type: ignore[arg-type]

    place = Place(tmp_path, saves)
    try:
        first = builds(place, [])
        assert [first.measure(plan) for plan in plans] == losses
    except KeyboardInterrupt:
        assert len(written) == saves
    again = builds(Place(tmp_path), place.state["builds"])
    assert [again.measure(plan) for plan in plans] == losses
    assert len(written) == len(plans)
    assert [path.name for path in tmp_path.iterdir()] == ["build-4"]
    folder, report = again.chosen(plans[3])
    assert (folder, report.output) == (tmp_path / "build-4", str(folder))
    shutil.rmtree(folder)
    assert again.chosen(plans[3])[0].is_dir()
    assert written[len(plans) :] == [folder]


@pytest.mark.usefixtures("two_builds")
def test_the_head_is_quantized_and_a_size_in_the_recipe_has_no_say(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses: [{allocate: {size: 1000000, head_bits: 8}}, quantize]\n")
    settings = {"calib": str(TEXT), "samples": 16, "seq_len": 48, "recipe": recipe}
    quantc.quantize(model, out=tmp_path / "out", max_kl=0.1, **settings)  # type: ignore[arg-type]
    assert CheckpointReader(tmp_path / "out").entries["model.embed_tokens.weight"].spec.bits == 8


@pytest.mark.usefixtures("two_builds")
def test_contradictions_are_refused_and_nothing_is_left_behind(model: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_kl": 0.1, "bits": 4}, "--max-kl chooses the bits itself; remove --bits"),
        ({"max_kl": 0.1, "max_ppl_increase": 0.1}, "two quality targets; remove one of them"),
        ({"max_kl": -1.0}, "a target is more than 0"),
        ({"bits": 4, "text": "t.txt"}, "--text is for measuring a quality target"),
        ({"max_kl": 1e-9, "samples": 8, "seq_len": 32, "calib": str(TEXT)}, "cannot be met within 8 bits"),
        ({"max_kl": 0.1, "samples": 4, "seq_len": 32, "calib": str(TEXT)}, "4 calibration samples are too few"),
    ]
    for settings, message in cases:
        with pytest.raises(UsageError, match=message):
            quantc.quantize(model, out=tmp_path / "out", **settings)
        assert list(tmp_path.iterdir()) == []
