"""Checkpoints in processes that never import quantc: where it is installed they load, elsewhere they are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import quantc
from quantc.checkpoint.integrity import REMEDY
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer

ROOT = Path(__file__).parents[3]
TABLE = "transformers.quantizers.auto"
SAY = """
import torch
from transformers import pipeline
say = pipeline("text-generation", model={packed!r}, dtype=torch.float32)
text = say("w3 w17", max_new_tokens=4, min_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
print(type(say.model.model.layers[0].mlp.up_proj).__name__, text)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    save_with_tokenizer(build("llama"), folder / "model")
    quantize_saved(folder, bits=4, group_size=32, method="rtn")
    return folder / "packed"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation puts into site-packages, but for compiled kernels."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def start(site: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process whose site-packages has one folder more, which Python looks through at its start."""
    line = f"import site, sys; site.addsitedir({str(site)!r}); assert 'quantc' not in sys.modules\n"
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments, "-c", line + script]
    return subprocess.run(command, cwd=site, capture_output=True, text=True, env=environment, timeout=180, check=False)


def test_a_pipeline_needs_no_import(packed: Path, installed: Path) -> None:
    done = start(installed, SAY.format(packed=str(packed)))
    assert done.returncode == 0, done.stderr
    kind, *words = done.stdout.split()
    assert kind == "QuantLinear"
    model = quantc.load(packed, dtype=torch.float32)
    with torch.no_grad():
        prompt = torch.tensor([[3, 17]])
        expected = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, 2:]
    assert words == [f"w{token}" for token in expected.tolist()]


@pytest.fixture
def other_transformers(installed: Path, tmp_path: Path) -> Path:
    """A folder with the start-up code, and packages of a line each in place of transformers."""
    (tmp_path / "quantc-startup.pth").write_text((installed / "quantc-startup.pth").read_text())
    (tmp_path / "transformers/quantizers").mkdir(parents=True)
    for name in ("__init__.py", "quantizers/__init__.py"):
        (tmp_path / "transformers" / name).touch()
    (tmp_path / "transformers/quantizers/auto.py").write_text("there = True\n")
    return tmp_path


def test_where_quantc_is_gone_nothing_is_said(other_transformers: Path) -> None:
    script = f"import sys; sys.modules['quantc'] = None\nimport {TABLE} as table; print(table.there)"
    done = start(other_transformers, script, "-W", "error")
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_where_quantc_is_broken_a_warning_says_why(other_transformers: Path) -> None:
    (other_transformers / "quantc.py").write_text("import lost_package\n")
    finders = "[type(finder).__name__ for finder in sys.meta_path]"
    script = f"before = {finders}\nimport {TABLE} as table; print(table.there, set(before) - set({finders}))"
    done = start(other_transformers, script)
    assert done.stdout == "True {'_ImportQuantc'}\n", done.stderr
    assert "UserWarning: transformers cannot load quantc checkpoints: No module named 'lost_package'" in done.stderr


def test_where_it_does_not_fit_transformers_a_warning_says_why(other_transformers: Path, installed: Path) -> None:
    (other_transformers / "quantc").symlink_to(installed / "quantc")
    (other_transformers / "torch.py").write_text("raise ImportError('too old')\n")
    done = start(other_transformers, f"import {TABLE} as table; print(table.there)")
    assert done.stdout == "True\n", done.stderr
    assert "quantc does not fit this version of transformers, which will not know it: too old" in done.stderr


# Without quantc


@pytest.fixture
def without_quantc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "quantc")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "quantc")


@pytest.mark.usefixtures("without_quantc")
def test_transformers_alone_refuses_with_the_remedy(packed: Path) -> None:
    with pytest.raises(ValueError, match="install it, and `import quantc` before the model is loaded"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_the_remedy_is_gone_from_a_loaded_model(packed: Path) -> None:
    assert json.loads((packed / "config.json").read_text())["transformers_weights"] == REMEDY
    for model in (quantc.load(packed), AutoModelForCausalLM.from_pretrained(packed)):
        assert not hasattr(model.config, "transformers_weights")
