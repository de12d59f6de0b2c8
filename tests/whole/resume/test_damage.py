"""What an interrupted run left is checked before anything is changed, and what was damaged is refused."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.checkpoint.journal import JOURNAL, DamagedRun, read_journal
from quantc.checkpoint.shards import ShardWriter
from quantc.driver import builds, job
from quantc.errors import CheckpointError, UsageError
from quantc.frontend import open_model
from quantc.pipeline.snapshot import checked, measured_builds, put_back, take
from quantc.report import LinearReport
from quantc.spec import QuantSpec
from tests.whole.resume.runs import FAST, PASSES, contents, files_of, quantize, recipe


def test_a_torn_tail_is_cut_off(kept: Path, model: Path, tmp_path: Path) -> None:
    (spool,) = kept.glob("*.data")
    with spool.open("ab") as stream:
        stream.write(b"torn")
    (kept / "shard-00002.data").write_bytes(b"torn")
    (kept / f"{JOURNAL}.new").write_text('{"version": 1, "iden')
    (kept / "plan.yaml").write_text("half of it")
    (kept / "distill-0123abc_").mkdir()
    (kept / "distill-0123abc_/factors").write_bytes(b"torn")
    quantize(model, tmp_path / "out", True, **FAST)
    quantize(model, tmp_path / "whole", **FAST)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def damage_spool(kept: Path) -> None:
    (spool,) = kept.glob("*.data")
    content = bytearray(spool.read_bytes())
    content[1000] ^= 1
    spool.write_bytes(content)


def shorten_spool(kept: Path) -> None:
    (spool,) = kept.glob("*.data")
    os.truncate(spool, 1000)


def cut_journal(kept: Path) -> None:
    os.truncate(kept / JOURNAL, 1000)


def age_journal(kept: Path) -> None:
    content = json.loads((kept / JOURNAL).read_text())
    (kept / JOURNAL).write_text(json.dumps({**content, "version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_spool, r"is damaged \(model.embed_tokens.weight\S* has another checksum\); pass --force without"),
        (shorten_spool, r"is damaged \(\S*shard-00001.data has 1000 of \d+ bytes\); pass --force without --resume to"),
        (cut_journal, r"resume.json cannot be read \(.*\); pass --force without --resume to start anew\.$"),
        (age_journal, r"resume.json cannot be read \(it has version 99, not 2\); pass --force"),
    ],
)
def test_what_was_damaged_is_refused_and_stays(
    damage: Callable[[Path], None], message: str, kept: Path, model: Path, tmp_path: Path
) -> None:
    damage(kept)
    before = files_of(kept)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize(model, tmp_path / "out", True, **FAST)
    assert not hasattr(caught.value, "__notes__")
    assert files_of(kept) == before
    quantize(model, tmp_path / "out", force=True, **FAST)
    assert not kept.exists()


def plant(kept: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the journal, and let its checksum be that of what it says now."""
    journal = read_journal(kept)
    assert journal is not None
    change(journal.state)
    journal.write(kept)


def shard_of(state: dict[str, Any]) -> dict[str, Any]:
    return state["tensors"]["shards"][0]


def move_tensor(state: dict[str, Any]) -> None:
    shard_of(state)["tensors"]["model.norm.weight"][2] = shard_of(state)["end"]


def grow_tensor(state: dict[str, Any]) -> None:
    shard_of(state)["tensors"]["model.norm.weight"][1] = [10**12]


def lose_tensor(state: dict[str, Any]) -> None:
    del shard_of(state)["tensors"]["model.layers.0.self_attn.q_proj.qweight"]


@pytest.mark.parametrize("name", ["../victim.txt", "{}/victim.txt", "sub/victim.txt", "victim.txt", "resume.json"])
def test_a_journal_names_no_other_files(name: str, kept: Path, model: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "victim.txt", tmp_path / "elsewhere"):
        place.write_text("irreplaceable")
    plant(kept, lambda state: shard_of(state).update(spool=name.format(tmp_path), end=0, tensors={}))
    before = files_of(kept)
    with pytest.raises(CheckpointError, match=r"is damaged \(the state of shard-00001.data cannot be read"):
        quantize(model, tmp_path / "out", True, **FAST)
    assert files_of(kept) == before
    assert (tmp_path / "victim.txt").read_text(encoding="utf-8") == "irreplaceable"


def test_links_in_the_folder_of_a_run_are_not_followed(kept: Path, model: Path, tmp_path: Path) -> None:
    victim, spool = tmp_path / "victim.txt", kept / "shard-00001.data"
    for name in (spool.name, JOURNAL, f"{JOURNAL}.new", "shard-00002.data", "plan.yaml"):
        saved = (kept / name).read_bytes() if (kept / name).exists() else b"irreplaceable"
        victim.write_bytes(saved)
        (kept / name).unlink(missing_ok=True)
        (kept / name).symlink_to(victim)
        for options in ({"resume": True}, {"force": True}):
            with pytest.raises(UsageError, match=rf"unfinished holds '{name}' that quantc did not write"):
                quantize(model, tmp_path / "out", **options, **FAST)
        assert victim.read_bytes() == saved
        (kept / name).unlink()
        if saved != b"irreplaceable":
            (kept / name).write_bytes(saved)
    spool.rename(victim)
    spool.symlink_to(victim)
    with pytest.raises(CheckpointError, match=r"shard-00001.data could not be written \(Too many levels of symbolic"):
        ShardWriter(spool).add("t", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_tensor, r"shard-00001.data cannot be read \('model.norm.weight' is not inside it\)"),
        (grow_tensor, r"shard-00001.data cannot be read \('model.norm.weight' is not inside it\)"),
        (lose_tensor, r"damaged \(model.layers.0.self_attn.q_proj.qweight is missing or has another shape\)"),
        (lambda state: shard_of(state).update(end=10**9), r"shard-00001.data has \d+ of 1000000000 bytes"),
        (lambda state: shard_of(state).update(end=True), r"True is no count"),
        (lambda state: state.update(blocks=5), r"damaged \(blocks of what was saved is not what a run saves\)"),
        (lambda state: state.update(finished=1), r"damaged \(finished of what was saved"),
        (lambda state: state["run"].update(specs={}), r"damaged \(specs of what was saved"),
    ],
)
def test_what_a_journal_says_is_checked_before_anything_is_changed(
    change: Callable[[dict[str, Any]], object], message: str, kept: Path, model: Path, tmp_path: Path
) -> None:
    with (kept / "shard-00001.data").open("ab") as stream:
        stream.write(b"torn")
    plant(kept, change)
    before = files_of(kept)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize(model, tmp_path / "out", True, **FAST)
    assert str(caught.value).endswith("; pass --force without --resume to start anew.")
    assert files_of(kept) == before


def test_a_journal_carries_a_checksum_of_itself(kept: Path, model: Path, tmp_path: Path) -> None:
    text = (kept / JOURNAL).read_text(encoding="utf-8")
    (kept / JOURNAL).write_text(text.replace('"bits": 4', '"bits": 3'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"resume.json cannot be read \(it has another checksum than it says\); "):
        quantize(model, tmp_path / "out", True, **FAST)
    with pytest.raises(UsageError, match=r"holds what cannot be read of an interrupted run; pass --resume to continue"):
        quantize(model, tmp_path / "out", **FAST)
    assert kept.exists()


JUNK: list[Any] = [None, True, -1, 2**70, 1.5, float("nan"), "", "../x", [], [[]], [None], {}, {"x": []}]


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places_in(value[key])]


def test_whatever_stands_in_a_journal_is_one_sentence(model: Path, tmp_path: Path) -> None:
    """Every kind of value in places all over what a run saves: refused, or of the right kind and put back."""
    settings: Any = {"recipe": recipe(tmp_path, PASSES["tuned"]), "calib": str(model / "text.txt")}
    doing = job.Job.of(settings, None, "cpu", None)
    run = doing.open(open_model(model), "")
    linear = next(iter(run.graph.linears.values()))
    run.report.linears = [LinearReport(linear.name, QuantSpec(3, 16), linear.shape, 0, 3.5, 0.1, "gptq", why="loss")]
    run.report.notes, run.report.rewrites = ["a note"], {"rotate": {"value": 2}}
    doing.passes[-1].restore({"found": [[2.0, 1.0]], "share": 0.5, "pace": doing.passes[-1].state()["pace"]})
    state = {"blocks": 1, "finished": 0, "tensors": {"shards": [], "checksums": {}}, "run": take(run, doing.passes)}
    whole = json.dumps(state)
    assert checked(json.loads(whole), run, doing.passes)
    chosen, refused = random.Random(0), 0
    for _ in range(400):
        mutated = json.loads(whole)
        container, key = chosen.choice(places_in(mutated))
        if chosen.random() < 0.2:
            del container[key]
        else:
            container[key] = chosen.choice(JUNK)
        try:
            put_back(run, doing.passes, checked(mutated, run, doing.passes)["run"])  # type: ignore[index]
        except DamagedRun as error:
            assert "of what was saved is not what a run saves); pass --force without --resume" in str(error)
            refused += 1
    assert refused > 250


@pytest.mark.parametrize(
    "builds",
    [
        None,
        {},
        [None],
        [{}],
        [{"specs": {}}],
        [{"specs": [], "bits": 9, "found": 1.0}],
        [{"specs": {}, "bits": 9, "found": "x"}],
    ],
)
def test_builds_that_no_quality_target_saves(builds: Any) -> None:
    assert measured_builds(None) == []
    build = {"specs": {}, "bits": 9, "found": 1.0}
    assert measured_builds({"builds": [build]}) == [build]
    with pytest.raises(
        DamagedRun, match=r"damaged \(what it says of builds is not what a quality target saves\); pass --"
    ):
        measured_builds({"builds": builds})


def test_a_build_that_was_damaged_after_it_was_measured_is_no_whole_one(
    kept: Path, model: Path, tmp_path: Path
) -> None:
    quantize(model, tmp_path / "out", True, **FAST)
    assert builds._is_whole(tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert not builds._is_whole(tmp_path / "out")
