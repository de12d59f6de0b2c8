"""Scales that are trained, codes fixed: another checkpoint of the same format, nearer to the text."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

import quantc
from quantc.checkpoint.reader import CheckpointReader

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/tune_scales.py"
TINY = ROOT / "tests/tiny_model"


def test_the_loss_falls_and_the_codes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, tuned = tmp_path / "packed", tmp_path / "tuned"
    quantc.quantize(TINY / "model", bits=2, group_size=32, method="rtn", preset="fast", out=packed)
    text = tmp_path / "text.txt"
    text.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    settings = ["--steps", "6", "--tokens", "128", "--rate", "0.01"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(packed), str(text), str(tuned), *settings])
    run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 6 of 6: ")
    before, after = CheckpointReader(packed), CheckpointReader(tuned)
    assert before.weight_map.keys() == after.weight_map.keys()
    changed = {name for name in before.weight_map if not torch.equal(before.tensor(name), after.tensor(name))}
    assert changed == {f"{name}.scales" for name in before.entries if ".layers." in name}
    losses = [quantc.evaluate(folder, text=str(text)).perplexity for folder in (packed, tuned)]
    assert losses[1] < 0.95 * losses[0]
