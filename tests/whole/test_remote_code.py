"""Code that a model's folder brings runs only where --trust-remote-code says so, and nothing ever asks on stdin."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

import quantc
from quantc.errors import ModelError
from quantc.frontend import open_model
from tests.families import build
from tests.helpers import save_with_tokenizer
from tests.quantc.cli_runner import run
from tests.quantc.frontend.folders import edit_config
from tests.whole.test_families import TOKENS

CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_kind"
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(autouse=True)
def no_question(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


@pytest.fixture
def own(tmp_path: Path, marker: Path) -> Path:
    """A model of a kind that transformers does not know."""
    folder = save_with_tokenizer(build("llama"), tmp_path / "model")
    (folder / "configuration_own.py").write_text(CONFIG_CODE.format(marker=str(marker)))
    (folder / "modeling_own.py").write_text(MODEL_CODE)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(folder, model_type="own_kind", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return folder


def needs_code(folder: Path) -> str:
    return (
        f"{folder} needs code that it brings along (auto_map in its config), which is not run unasked; read that code, "
        "then pass --trust-remote-code (in Python trust_remote_code=True)."
    )


def test_own_code_is_not_run_unasked(own: Path, tmp_path: Path, marker: Path) -> None:
    text = str(own / "text.txt")
    for words in (
        f"quantize {own} --bits 4 --method rtn --out {tmp_path / 'out'}",
        f"plan {own} --avg-bits 4 --out {tmp_path / 'plan.yaml'}",
        f"pareto {own} --out {tmp_path / 'curve'}",
        f"eval {own} --text {text} --context 16",
    ):
        result = run(*words.split())
        assert (result.exit_code, result.stderr) == (1, f"Error: {needs_code(own)}\n")
    assert not marker.exists()


def test_own_code_that_is_trusted(own: Path, tmp_path: Path, marker: Path) -> None:
    out = tmp_path / "out"
    words = f"quantize {own} --preset fast --bits 8 --group-size 8 --method rtn --out {out} --trust-remote-code"
    result = run(*words.split())
    assert result.exit_code == 0, result.stderr
    assert "--text wikitext2 --trust-remote-code" in result.stdout
    assert marker.exists()
    manifest = json.loads((out / "quantc.json").read_text())
    assert manifest["source"]["trust_remote_code"] is True
    report = json.loads((out / "report.json").read_text())
    assert report["notes"] == ["code that the model brings was run (--trust-remote-code)"]
    with torch.no_grad():
        expected = build("llama")(input_ids=TOKENS, use_cache=False).logits
        packed = quantc.load(out, dtype=torch.float32, trust_remote_code=True)
        found = packed(input_ids=TOKENS, use_cache=False).logits
    assert type(packed).__name__ == "OwnForCausalLM"
    assert (found - expected).norm() < 0.02 * expected.norm()
    marker.unlink()
    with pytest.raises(ModelError) as caught:
        quantc.load(out)
    assert str(caught.value) == needs_code(out)
    assert not marker.exists()
    scores = quantc.evaluate(out, text=str(own / "text.txt"), against=own, context=16, trust_remote_code=True)
    assert scores.mean_kl is not None
    assert scores.mean_kl < 0.01


def test_where_transformers_knows_the_model_its_own_class_is_used(own: Path, tmp_path: Path, marker: Path) -> None:
    edit_config(own, model_type="llama", architectures=["LlamaForCausalLM"])
    source = open_model(own)
    assert type(source.model).__module__.startswith("transformers.models.")
    quantc.quantize(own, bits=4, method="rtn", out=tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())
    assert json.loads((tmp_path / "out/quantc.json").read_text())["source"]["trust_remote_code"] is False
    assert not marker.exists()


def test_a_tokenizer_that_brings_code(tmp_path: Path, marker: Path) -> None:
    folder = save_with_tokenizer(build("llama"), tmp_path / "model")
    (folder / "tokenization_own.py").write_text(TOKENIZER_CODE.format(marker=str(marker)))
    file = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    settings = {"bits": 4, "group_size": 8, "calib": str(folder / "text.txt"), "samples": 2, "seq_len": 16}
    with pytest.raises(ModelError) as caught:
        quantc.quantize(folder, out=tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert str(caught.value) == needs_code(folder)
    assert not marker.exists()
    quantc.quantize(folder, out=tmp_path / "trusted", trust_remote_code=True, **settings)  # type: ignore[arg-type]
    assert marker.exists()
    assert (tmp_path / "trusted/tokenization_own.py").is_file()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_from_the_hub_is_not_fetched_unasked(key: str, tmp_path: Path) -> None:
    folder = save_with_tokenizer(build("llama"), tmp_path / "model")
    edit_config(folder, **{key: "owner/kernel"})
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    assert str(caught.value) == (
        f"{folder}: config.json asks for the kernel 'owner/kernel', which is code from the hub that is not run "
        "unasked; remove that entry, or pass --trust-remote-code (in Python trust_remote_code=True)."
    )
