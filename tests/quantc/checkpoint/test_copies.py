"""`quantc inspect` on what `save_pretrained` writes from a loaded checkpoint, which has no report."""

from __future__ import annotations

import json
from pathlib import Path

import quantc
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run


def test_a_copy_is_inspected_as_far_as_it_tells(tmp_path: Path) -> None:
    save_with_tokenizer(build("mixtral"), tmp_path / "model")
    quantc.quantize(tmp_path / "model", bits=4, group_size=8, head_bits=8, method="rtn", out=tmp_path / "out")
    quantc.load(tmp_path / "out").save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy/report.json").exists()
    original, copy = (run("inspect", str(tmp_path / name), "--json") for name in ("out", "copy"))
    assert copy.exit_code == 0, copy.stderr
    one, other = json.loads(original.stdout), json.loads(copy.stdout)
    same = ("name", "label", "shape", "experts", "bits_per_weight")
    keys = [[{key: linear[key] for key in same} for linear in found["linears"]] for found in (one, other)]
    assert sorted(keys[0], key=str) == sorted(keys[1], key=str)
    assert other["bits_per_weight"] == one["bits_per_weight"]
    assert {linear["error"] for linear in other["linears"]} == {None}
    shown = run("inspect", str(tmp_path / "copy")).stdout
    assert "there is no report.json, as in a copy that save_pretrained writes: errors and methods are unknown" in shown
