"""A run that was interrupted and resumed writes what an uninterrupted one writes, to the byte."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.checkpoint import writer
from quantc.checkpoint.workplace import Workplace
from quantc.checkpoint.writer import CheckpointWriter
from quantc.driver import job, quality
from quantc.errors import CheckpointError, UsageError
from quantc.pipeline.base import Pass
from quantc.pipeline.run import Run
from quantc.pipeline.work import BlockWork
from quantc.recipe import Recipe
from tests.families import build
from tests.helpers import first_blocks, save_with_tokenizer, thinned
from tests.quantc.cli_runner import run as run_command
from tests.whole.resume.runs import BLOCK, FAST, PASSES, TINY, check, contents, interrupt, quantize, recipe

ALIKE = ("uniform", "scaled", "two_of_four")


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


# Slow ones have the passes and the formats of others.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in PASSES]
)
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
    thinned(["gpt2", "mixtral", "jamba", "gpt_neo", "gemma3_text", "gpt_oss", "zamba2", "gemma4_shared_kv"], every=4),
)
def test_every_kind_of_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked experts, either way round; Conv1D; norms after writers; mixed blocks; weights that blocks share."""
    model = save_with_tokenizer(build(family).to(torch.bfloat16), tmp_path / "model")
    second = {"gpt2": "transformer.h.1.", "gpt_neo": "transformer.h.1."}.get(family, BLOCK.format(1))
    check(monkeypatch, model, tmp_path, [second], bits=3, group_size=16, preset="best")


@pytest.mark.parametrize(
    "settings",
    [FAST, {"bits": 4, "calib": "none"}, {"avg_bits": 4.5}, pytest.param({"size": "200kB"}, marks=pytest.mark.slow)],
    ids=str,
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


@pytest.mark.parametrize("skip", thinned([9, 0], every=2))
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
    monkeypatch.setattr(quality, "BUILDS", 3)
    model = first_blocks(TINY, 2, tmp_path / "model")
    settings = {"calib": str(TINY.parent / "heldout.txt"), "samples": 16, "seq_len": 48, "max_kl": 0.03}
    quantize(model, tmp_path / "whole", **settings)
    built: list[int] = []
    original = job.Job.build

    def count(self: job.Job, *args: Any, **options: Any) -> Any:
        built.append(len(built))
        return original(self, *args, **options)

    monkeypatch.setattr(job.Job, "build", count)
    run = partial(quantize, model, tmp_path / "out", True, **settings)
    error = interrupt(monkeypatch, run, BLOCK.format(1))
    inner = tmp_path / "out.unfinished/build-1.unfinished"
    assert error.__notes__ == [f"Kept in {inner}: 1 of 2 blocks; --resume continues from there."]
    with pytest.raises(UsageError, match="passes|model|target"):
        quantize(model, tmp_path / "out", True, **{**settings, "max_kl": 0.04})
    with monkeypatch.context() as patch:
        patch.setattr(Workplace, "adopt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    done = len(built)
    run()
    assert len(built) == done
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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


# Killed


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
