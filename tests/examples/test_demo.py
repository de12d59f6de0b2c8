"""The table that ends the demo."""

from __future__ import annotations

import sys
from pathlib import Path
from runpy import run_path

import pytest

import quantc
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer, tiny_text

SCRIPT = Path(__file__).parents[2] / "examples/demo.py"


def test_both_models_are_lines_of_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    quantize_saved(tmp_path, bits=3, group_size=16, method="rtn", preset="fast")
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(300, seed=1))
    arguments = [str(tmp_path / "packed"), str(tmp_path / "model"), str(text)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    run_path(str(SCRIPT), run_name="__main__")
    heading, original, quantized = capsys.readouterr().out.splitlines()
    assert heading.split() == ["weights", "bits", "per", "weight", "KL", "divergence", "perplexity", "tokens/s"]
    found = quantc.evaluate(tmp_path / "packed", against=tmp_path / "model", text=str(text))
    assert found.mean_kl is not None
    assert original.split()[:5] == [
        "original",
        *megabytes(tmp_path / "model"),
        "32.00",
        f"{found.perplexity_original:.2f}",
    ]
    measured = [f"{found.bits_per_weight:.2f}", f"{found.mean_kl:.3f}", f"{found.perplexity:.2f}"]
    assert quantized.split()[:6] == ["quantized", *megabytes(tmp_path / "packed"), *measured]
    assert float(original.split()[-1]) > 0
    assert float(quantized.split()[-1]) > 0


def megabytes(folder: Path) -> list[str]:
    """Return the size of a folder's weight files, as the table shows it."""
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.1f} MB".split()
