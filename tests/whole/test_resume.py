"""A run that was interrupted and resumed writes what an uninterrupted one writes, to the byte."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc import api
from quantc.checkpoint import writer
from quantc.checkpoint.journal import JOURNAL, DamagedRun, read_journal
from quantc.checkpoint.reader import verify
from quantc.checkpoint.shards import ShardWriter
from quantc.checkpoint.workplace import Workplace
from quantc.checkpoint.writer import CheckpointWriter
from quantc.driver import builds, job
from quantc.errors import CalibrationError, CheckpointError, ModelError, UsageError
from quantc.frontend import open_model
from quantc.pipeline.base import Pass
from quantc.pipeline.run import Run
from quantc.pipeline.snapshot import checked, measured_builds, put_back, take
from quantc.pipeline.work import BlockWork
from quantc.progress import LogProgress
from quantc.recipe import Recipe
from quantc.report import LinearReport, read_report
from quantc.spec import QuantSpec
from tests.families import build
from tests.helpers import save_with_tokenizer, thinned
from tests.quantc.cli_runner import run as run_command

BLOCK = "model.layers.{}."
FAST = {"bits": 4, "group_size": 16, "method": "rtn"}
TINY = Path(__file__).parent.parent / "tiny_model" / "model"
PASSES: dict[str, list[Any]] = {
    "uniform": [],
    "scaled": ["scale", "rotate"],
    "folded": [{"rotate": {"residual": "folded", "value": "folded"}}],
    "grouped": ["importance", "group_channels", "rotate", {"quantize": {"rounds": 1, "correct": 0.5}}],
    "sparse": [{"sparsify": {"sparsity": 0.5}}],
    "two_of_four": ["importance", {"sparsify": {"sparsity": "2:4"}}],
    "compensated": [{"compensate": {"rank": 2}}, "scale"],
    "tuned": ["rotate", "quantize", {"tune": {"steps": 3}}],
    "distilled": ["quantize", {"distill": {"steps": 2}}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks, the head tied to the embedding, one block without rotary positions."""
    return save_with_tokenizer(build("smollm3"), tmp_path_factory.mktemp("four") / "model")


def quantize(model: Path, out: Path, resume: bool = False, **settings: Any) -> None:
    options = {"calib": str(model / "text.txt"), "samples": 4, "seq_len": 32, **settings}
    quantc.quantize(model, out=out, resume=resume, **options)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint; of the report what does not tell of the run itself."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    for key in ("cpu_seconds", "wall_seconds", "peak_rss_bytes", "output"):
        del report[key]
    of_the_run = ("interrupted run", " a block (median)")
    report["notes"] = [note for note in report["notes"] if not any(words in note for words in of_the_run)]
    return files | {"report": report}


def interrupt(
    patched: pytest.MonkeyPatch,
    run: Callable[[], object],
    tensor: str,
    error: BaseException | None = None,
    method: str = "add",
    skip: int = 0,
) -> BaseException:
    """Run until a tensor is to be written (by `method`) whose name starts so; then the error comes instead of it.

    skip: of so many such tensors before.
    """
    original, seen = getattr(CheckpointWriter, method), []
    raised = KeyboardInterrupt() if error is None else error

    def fail(self: CheckpointWriter, name: str, value: torch.Tensor) -> None:
        seen.extend([name] if name.startswith(tensor) else [])
        if len(seen) > skip:
            raise raised
        original(self, name, value)

    with patched.context() as patch:
        patch.setattr(CheckpointWriter, method, fail)
        with pytest.raises(type(raised)):
            run()
    return raised


def check(patched: pytest.MonkeyPatch, model: Path, folder: Path, stops: list[str], **settings: Any) -> list[str]:
    """Interrupt a run at each of these tensors and compare with one that is not; the notes of its report."""
    quantize(model, folder / "whole", **settings)
    for stop in stops:
        interrupt(patched, lambda: quantize(model, folder / "out", True, **settings), stop, skip=2)
        assert (folder / "out.unfinished").exists()
    quantize(model, folder / "out", True, **settings)
    assert contents(folder / "out") == contents(folder / "whole")
    assert not (folder / "out.unfinished").exists()
    verify(folder / "out")
    return read_report(folder / "out")["notes"]


def recipe(folder: Path, passes: list[Any]) -> Path:
    rounds = any(item == "quantize" or (isinstance(item, dict) and "quantize" in item) for item in passes)
    allocate = {"allocate": {"bits": 3, "group_size": 16}}
    file = folder / "recipe.yaml"
    file.write_text(json.dumps({"version": 1, "passes": [allocate, *passes, *([] if rounds else ["quantize"])]}))
    return file


# The same bytes


class Cast(Pass):
    """The example of docs/add-a-pass.md: changes weights in place, those of linears that are kept among them."""

    def build(self, work: BlockWork) -> None:
        for linear in work.block.quantized:
            weight = work.weight(linear)
            weight.copy_(weight.to(torch.bfloat16))


def test_a_pass_that_changes_what_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states behind the blocks that were finished are those of the changed weights."""
    build_passes = Recipe.build_passes
    monkeypatch.setattr(Recipe, "build_passes", lambda self: [Cast(None), *build_passes(self)])
    monkeypatch.setattr(Cast, "name", "cast", raising=False)
    settings: dict[str, Any] = {"bits": 3, "group_size": 16, "pins": {"*.0.*": 16, "*.up_proj": 16}}
    check(monkeypatch, model, tmp_path, [BLOCK.format(2)], **settings)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_goes_on_as_if_nothing_had_happened(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = check(monkeypatch, model, tmp_path, [BLOCK.format(2)], recipe=recipe(tmp_path, PASSES[name]))
    assert "2 of 4 blocks are from an interrupted run; times are of the last run alone" in notes


@pytest.mark.parametrize(
    ("stops", "preset"), thinned([([1, 1, 2], "balanced"), ([1, 1, 2], "best"), ([3], "best")], every=3), ids=str
)
def test_it_may_be_interrupted_anywhere_and_again(
    stops: list[int], preset: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [BLOCK.format(stop) for stop in stops]
    notes = check(monkeypatch, model, tmp_path, names, bits=3, group_size=16, preset=preset, head_bits=4)
    assert sum("interrupted run" in note for note in notes) == len(set(stops))


@pytest.mark.parametrize(
    "family",
    thinned(["gpt2", "mixtral", "jamba", "gemma3_text", "gpt_oss", "zamba2", "gpt_neo", "gemma4_shared_kv"], every=3),
)
def test_every_kind_of_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked experts, either way round; Conv1D; norms after writers; mixed blocks; weights that blocks share."""
    model = save_with_tokenizer(build(family).to(torch.bfloat16), tmp_path / "model")
    second = {"gpt2": "transformer.h.1.", "gpt_neo": "transformer.h.1."}.get(family, BLOCK.format(1))
    check(monkeypatch, model, tmp_path, [second], bits=3, group_size=16, preset="best")


@pytest.mark.parametrize(
    "settings", [FAST, {"bits": 4, "calib": "none"}, {"avg_bits": 4.5}, {"size": "200kB"}], ids=str
)
def test_other_ways_to_ask(
    settings: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(monkeypatch, model, tmp_path, [BLOCK.format(2)], **settings)


def test_a_plan_that_was_handed_in(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(model, tmp_path / "first", avg_bits=4.5)
    check(monkeypatch, model, tmp_path, [BLOCK.format(2)], plan=tmp_path / "first/plan.yaml", preset="balanced")


def test_a_size_that_took_a_second_build(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish_weights, plan = job.finish_weights, job.Job._plan
    budgets: list[int] = []

    def note_budget(self: job.Job, run: Run) -> None:
        budgets.append(job.allocation(self.passes).size)  # type: ignore[union-attr, arg-type]
        plan(self, run)

    def finish_larger(run: Run, *arguments: Any) -> None:
        finish_weights(run, *arguments)
        run.report.weights_bytes += 3000 * (budgets[-1] == 200_000)

    monkeypatch.setattr(job.Job, "_plan", note_budget)
    monkeypatch.setattr(job, "finish_weights", finish_larger)
    settings: dict[str, Any] = {"size": 200_000}
    quantize(model, tmp_path / "whole", **settings)
    run = partial(quantize, model, tmp_path / "out", True, **settings)
    interrupt(monkeypatch, run, BLOCK.format(2) + "self_attn.q_proj.qweight", skip=1)
    with pytest.raises(UsageError, match=r"allocate size 19\d{4}, and this run has 190000"):
        quantize(model, tmp_path / "out", True, size=190_000)
    with pytest.raises(UsageError, match="size 200000, and this run has 210000"):
        quantize(model, tmp_path / "out", True, size=210_000)
    run()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_many_shards_and_a_disk_that_fills_while_they_are_put_in_order(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CheckpointWriter", partial(CheckpointWriter, shard_bytes=10_000))
    quantize(model, tmp_path / "whole", **FAST)
    interrupt(monkeypatch, lambda: quantize(model, tmp_path / "out", **FAST), BLOCK.format(2))
    copied, copy = [], writer.ShardWriter.finish

    def full(self: Any, file: Path) -> None:
        copied.append(file)
        if len(copied) == 3:
            file.write_bytes(b"half")
            raise CheckpointError("the disk is full")
        copy(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "finish", full)
        with pytest.raises(CheckpointError, match="full") as caught:
            quantize(model, tmp_path / "out", True, **FAST)
    kept = tmp_path / "out.unfinished"
    assert caught.value.__notes__ == [f"Kept in {kept}: 4 of 4 blocks; --resume continues from there."]
    assert len(list(kept.glob("*.safetensors"))) == 3
    quantize(model, tmp_path / "out", True, **FAST)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("skip", [0, 9])
def test_scales_that_a_finishing_pass_was_about_to_replace(
    skip: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"recipe": recipe(tmp_path, PASSES["distilled"])}
    quantize(model, tmp_path / "whole", **settings)
    interrupt(monkeypatch, lambda: quantize(model, tmp_path / "out", **settings), "", method="replace", skip=skip)
    quantize(model, tmp_path / "out", True, **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_finished_is_not_done_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"recipe": recipe(tmp_path, PASSES["distilled"])}
    quantize(model, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "commit", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
        with pytest.raises(OSError, match="gone"):
            quantize(model, tmp_path / "out", **settings)
    for name in ("analyse", "_build_block", "_run_again"):
        monkeypatch.setattr(f"quantc.pipeline.sweep.{name}", lambda *_: pytest.fail("done again"))
    quantize(model, tmp_path / "out", True, **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_quality_target_keeps_the_builds_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"calib": str(TINY.parent / "heldout.txt"), "samples": 16, "seq_len": 48, "max_kl": 0.03}
    quantize(TINY, tmp_path / "whole", **settings)
    built: list[int] = []
    original = job.Job.build

    def count(self: job.Job, *args: Any, **options: Any) -> Any:
        built.append(len(built))
        return original(self, *args, **options)

    monkeypatch.setattr(job.Job, "build", count)
    run = partial(quantize, TINY, tmp_path / "out", True, **settings)
    error = interrupt(monkeypatch, run, BLOCK.format(2))
    inner = tmp_path / "out.unfinished/build-1.unfinished"
    assert error.__notes__ == [f"Kept in {inner}: 2 of 4 blocks; --resume continues from there."]
    with pytest.raises(UsageError, match="passes|model|target"):
        quantize(TINY, tmp_path / "out", True, **{**settings, "max_kl": 0.04})
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    done = len(built)
    run()
    assert len(built) == done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Killed


RUNNER = """
import os, sys
from quantc.checkpoint.writer import CheckpointWriter
from quantc.cli import main
add, tensor, number = CheckpointWriter.add, sys.argv[1], int(sys.argv[2])
def stop(self, name, value):
    if name.startswith(tensor):
        os.kill(os.getpid(), number)
    add(self, name, value)
CheckpointWriter.add = stop
main(sys.argv[3:], prog_name="quantc")
"""


@pytest.mark.parametrize("number", thinned([signal.SIGKILL, signal.SIGTERM], every=2))
def test_a_process_that_is_killed(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    text = str(model / "text.txt")
    words = f"quantize {model} --bits 3 --group-size 16 --calib {text} --samples 4 --seq-len 32 --resume"
    command = [sys.executable, "-c", RUNNER, BLOCK.format(2), str(int(number)), *words.split(), "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    kept = tmp_path / "out.unfinished"
    if number == signal.SIGTERM:
        assert killed.returncode == 130
        last = killed.stderr.strip().splitlines()[-1]
        assert last == f"Error: interrupted. Kept in {kept}: 2 of 4 blocks; --resume continues from there."
    else:
        assert killed.returncode == -number
    resumed = run_command(*words.split(), "--out", str(tmp_path / "out"))
    assert resumed.exit_code == 0
    assert "2 of 4 blocks are from an interrupted run" in resumed.stderr
    assert run_command(*words.split(), "--out", str(tmp_path / "whole")).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# What an interrupted run left


@pytest.fixture(scope="module")
def interrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patched:
        interrupt(patched, lambda: quantize(model, place / "out", **FAST), BLOCK.format(2))
    return place / "out.unfinished"


@pytest.fixture
def kept(interrupted: Path, tmp_path: Path) -> Path:
    """The folder of a run that was interrupted in its third block."""
    return shutil.copytree(interrupted, tmp_path / "out.unfinished")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def test_other_settings_are_refused_by_name_and_touch_nothing(kept: Path, model: Path, tmp_path: Path) -> None:
    before = files_of(kept)
    other = shutil.copytree(model, tmp_path / "other")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (model, {**FAST, "bits": 3}, "allocate bits 4, and this run has 3"),
        (model, {**FAST, "method": "gptq"}, "quantize method rtn, and this run has gptq"),
        (model, {**FAST, "samples": 3}, "calibration samples 4, and this run has 3"),
        (model, {**FAST, "preset": "best"}, "passes allocate, quantize, and this run has allocate, "),
        (other, FAST, "model model, and this run has other"),
    ]
    for source, settings, words in cases:
        with pytest.raises(UsageError) as caught:
            quantize(source, tmp_path / "out", True, **settings)
        message = str(caught.value)
        assert message.startswith(f"{kept} was begun with {words}")
        remedy = "; --resume needs the same settings, so pass those, or --force without --resume to start anew."
        assert message.endswith(remedy)
        assert files_of(kept) == before


def test_a_model_that_was_written_again_is_another(kept: Path, model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    try:
        with pytest.raises(
            UsageError, match=r"was begun with file model.safetensors \d+ bytes, written 20.* UTC, and this run"
        ):
            quantize(model, tmp_path / "out", True, **FAST)
    finally:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_another_text_is_told_from_its_tokens(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text((model / "text.txt").read_text())
    run = partial(quantize, model, tmp_path / "out", True, bits=4, group_size=16, calib=str(text))
    interrupt(monkeypatch, run, BLOCK.format(2))
    text.write_text("w3 " + text.read_text())
    with pytest.raises(
        UsageError, match=r"was begun with calibration tokens [0-9a-f]{16}, and this run has [0-9a-f]{16};"
    ):
        run()


def test_sums_depend_on_the_number_of_threads(kept: Path, model: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(
            UsageError, match=rf"with threads \(OMP_NUM_THREADS\) {before}, and this run has {before + 1};"
        ):
            quantize(model, tmp_path / "out", True, **FAST)
    finally:
        torch.set_num_threads(before)


def test_hours_of_work_are_not_thrown_away_unasked(kept: Path, model: Path, tmp_path: Path) -> None:
    before = files_of(kept)
    with pytest.raises(UsageError) as caught:
        quantize(model, tmp_path / "out", **FAST)
    assert str(caught.value) == (
        f"{kept} holds 2 of 4 blocks of an interrupted run; pass --resume to continue it, or --force to start anew."
    )
    assert files_of(kept) == before
    quantize(model, tmp_path / "out", force=True, **FAST)
    assert read_report(tmp_path / "out")["notes"] == []


def test_where_there_is_nothing_to_resume_a_run_starts(model: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Listener(LogProgress):
        def note(self, text: str) -> None:
            told.append(text)

    quantize(model, tmp_path / "out", True, progress=Listener(), **FAST)
    assert told == [f"there is no interrupted run of {tmp_path / 'out'} to resume; this one starts anew"]


def test_two_runs_do_not_write_into_one_folder(kept: Path, model: Path, tmp_path: Path) -> None:
    for options in ({"resume": True}, {"force": True}):
        with CheckpointWriter(tmp_path / "out", **options), pytest.raises(UsageError) as caught:
            quantize(model, tmp_path / "out", **options, **FAST)
        assert str(caught.value) == (
            f"another run is writing into {kept}; wait until it is done, or choose another --out."
        )
        assert "__notes__" not in vars(caught.value)


# What stays, and what goes


def test_before_the_first_block_nothing_stays(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = interrupt(monkeypatch, lambda: quantize(model, tmp_path / "out", **FAST), BLOCK.format(0))
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (RuntimeError("a bug"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (ModelError("NaN"), False),
        (CalibrationError("NaN"), False),
    ],
)
def test_what_the_same_input_would_meet_again_leaves_nothing(
    error: BaseException, stays: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, lambda: quantize(model, tmp_path / "out", **FAST), BLOCK.format(2), error)
    assert (tmp_path / "out.unfinished").exists() == stays
    assert hasattr(error, "__notes__") == stays


def test_points_of_a_curve_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = str(TINY.parent / "heldout.txt")
    settings: dict[str, Any] = {"calib": text, "samples": 8, "seq_len": 32, "text": text, "verify": 1}
    error = interrupt(monkeypatch, lambda: api.pareto(TINY, out=tmp_path, **settings), BLOCK.format(2))
    assert list(tmp_path.iterdir()) == []
    assert not hasattr(error, "__notes__")
