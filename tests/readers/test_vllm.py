"""quantc's own checkpoints in vLLM, as they are: logits and text are those of quantc.load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.export.probe import logits_of, probe_tokens, tokenizer_of
from tests.readers import environments, lab

pytestmark = pytest.mark.slow

MOST_ERROR = 1e-5  # of logits in float32; 1e-6 is usual, and Gemma's are 5e-6
ROTATED = {"preset": "balanced", "method": "gptq", "calib": "self", "samples": 4, "seq_len": 32}
CHOSEN = {"bits": None, "group_size": None}
FOLDED = "version: 1\npasses:\n- allocate\n- rotate: {residual: folded}\n- quantize\n"
GEMMA2 = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32}
# What is packed how: a model of tests/quantc/export/tiny.py, what differs in it, and settings.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "packed tables": ("llama", lab.MODELS["llama"], {"head_bits": 8}),
    "several widths at once": ("llama", lab.MODELS["llama"], {"pins": {"*q_proj": 16, "*k_proj": 3, "*up_proj": 2}}),
    "groups along outputs": ("qwen2", lab.MODELS["qwen2"], {"formats": ["w4g32-per_ic"], **CHOSEN}),
    "rotated inputs": ("qwen3", lab.MODELS["qwen3"], ROTATED),
    "a rotated residual stream": ("llama", lab.MODELS["llama"], {**ROTATED, "preset": None, "recipe": "folded.yaml"}),
    "a table that is not asked about": ("gemma2", GEMMA2, {"head_bits": 8}),
    "a linear of three": ("phi3", lab.WIDE, {}),
    "dropped groups": ("llama", lab.MODELS["llama"], {"sparsity": 0.4}),
    "4-bit floats": ("llama", lab.MODELS["llama"], {"formats": ["nvfp4"], **CHOSEN}),
    "trellis codes": ("qwen3", lab.MODELS["qwen3"], {**ROTATED, "bits": 3, "group_size": None, "code": "trellis"}),
    "experts": ("qwen3_moe", {**lab.WIDE, "head_dim": 32}, {}),
    "renamed experts": ("mixtral", lab.WIDE, {}),
}
SLICED = ("packed tables", "several widths at once", "groups along outputs", "a linear of three", "4-bit floats")
COMPILED = ("packed tables", "rotated inputs", "a rotated residual stream", "trellis codes")
EXPERTS = ("experts", "renamed experts")  # in a process without others: vLLM sets up groups for its first model alone
DENSE = tuple(name for name in CHECKPOINTS if name not in EXPERTS)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, Path]]:
    """Logits (T, V) of lab.TOKENS by quantc, and the folder, of each checkpoint."""
    place = tmp_path_factory.mktemp("packed")
    (place / "folded.yaml").write_text(FOLDED)
    found = {}
    for number, (name, (model, differs, settings)) in enumerate(CHECKPOINTS.items()):
        lab.save(model, place / f"{number}-model", differs)
        if "recipe" in settings:
            settings = {**settings, "recipe": str(place / settings["recipe"])}
        lab.quantize(place / f"{number}-model", place / str(number), **{"bits": 4, **settings})
        loaded = quantc.load(place / str(number), dtype=torch.float32).eval()
        found[name] = (logits_of(loaded, lab.TOKENS), place / str(number))
    return found


@pytest.mark.parametrize(
    ("reader", "names"),
    [("vLLM", DENSE), ("vLLM", EXPERTS), ("vLLM in two processes", SLICED), ("vLLM compiled", COMPILED)],
    ids=["dense", "experts", "two processes", "compiled"],
)
def test_checkpoints_run_as_they_are(
    reader: str, names: tuple[str, ...], packed: dict[str, tuple[torch.Tensor, Path]]
) -> None:
    environments.require(reader)
    assert lab.disagreements(reader, {name: packed[name] for name in names}, MOST_ERROR) == ""


def test_what_cannot_be_sliced_is_refused(packed: dict[str, tuple[torch.Tensor, Path]]) -> None:
    environments.require("vLLM in two processes")
    said = lab.disagreements("vLLM in two processes", {"rotated": packed["rotated inputs"]}, MOST_ERROR)
    assert "WorkerProc initialization failed" in said


def test_smollm2_says_the_same_in_vllm(tmp_path: Path) -> None:
    environments.require("vLLM's text")
    pytest.importorskip("gguf")
    lab.quantize("demo:smollm2", tmp_path / "native", **{**ROTATED, "bits": 4, "seq_len": 128})
    lab.quantize("demo:smollm2", tmp_path / "plain", bits=4, target="vllm")
    quantc.export(tmp_path / "plain", to="vllm", out=tmp_path / "exported")
    for checkpoint, folder in (("native", "native"), ("plain", "plain"), ("plain", "exported")):
        model = quantc.load(tmp_path / checkpoint, dtype=torch.float32).eval()
        tokens = probe_tokens(tokenizer_of(tmp_path / checkpoint), model.config)[:48]
        model.generation_config.eos_token_id = None
        whole = model.generate(tokens[None], max_new_tokens=64, do_sample=False)
        (answer,) = environments.ask("vLLM's text", [tmp_path / folder], tokens)
        assert isinstance(answer, torch.Tensor), answer
        assert answer[0].long().tolist() == whole[0, len(tokens) :].tolist(), folder
