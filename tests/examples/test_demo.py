"""The table of the demo, from what `quantc eval --json` prints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from quantc.evaluation.scores import Evaluation

SCRIPT = Path(__file__).parents[2] / "examples/demo.py"
ORIGINAL = {
    "weights_bytes": 98_400_000,
    "bits_per_weight": 5.0,
    "mean_kl": None,
    "perplexity": 28.69,
    "tokens_per_second": 20.0,
}
QUANTIZED = {
    **ORIGINAL,
    "weights_bytes": 86_600_000,
    "bits_per_weight": 4.34,
    "mean_kl": 0.1193,
    "tokens_per_second": 61.25,
}


def test_both_models_are_lines_of_one_table(tmp_path: Path) -> None:
    assert ORIGINAL.keys() <= {field.name for field in fields(Evaluation)}
    for name, found in (("original", ORIGINAL), ("quantized", QUANTIZED)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    shown = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown[0].split() == ["weights", "bits", "per", "weight", "KL", "divergence", "perplexity", "tokens/s"]
    assert shown[1].split() == ["original", "98.4", "MB", "5.00", "28.69", "20.0"]
    assert shown[2].split() == ["quantized", "86.6", "MB", "4.34", "0.119", "28.69", "61.2"]
