"""Every table of an architecture: llama.cpp computes the logits that transformers computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantc.errors import ModelError
from quantc.evaluation import llama_cpp
from quantc.export.gguf import proof
from quantc.export.gguf.architectures import architecture_of, base
from tests.quantc.export.tiny import LLAMA3, MODELS, build, logits, write_floats

pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(llama_cpp.missing() is not None, reason=str(llama_cpp.missing()))


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    write_floats(model, tmp_path / "tiny.gguf")
    tokens = torch.randint(model.config.vocab_size, (48,), generator=torch.Generator().manual_seed(1))
    with llama_cpp.LlamaCpp(tmp_path / "tiny.gguf", 48) as found:
        agreement = proof.measure(logits(model, tokens), found.logits(tokens), None)
    # Its GELU is a table in float16.
    assert agreement.error < (5e-4 if name.startswith(("gemma", "gpt2")) else 1e-4)


@needs_llama_cpp
def test_rows_in_the_wrong_order_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_neighbours", lambda n, _: torch.arange(n))
    model = build("llama")
    write_floats(model, tmp_path / "tiny.gguf")
    tokens = torch.randint(model.config.vocab_size, (48,), generator=torch.Generator().manual_seed(1))
    with llama_cpp.LlamaCpp(tmp_path / "tiny.gguf", 48) as found:
        assert proof.measure(logits(model, tokens), found.logits(tokens), None).error > 0.05


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "the qwen3_moe model has norm_topk_prob False, but llama.cpp computes "
         "this architecture with True; it cannot be exported to GGUF."),
        ("gemma3", {"query_pre_attn_scalar": 256}, "the gemma3_text model has query_pre_attn_scalar 256, but llama.cpp "
         "computes this architecture with 16; it cannot be exported to GGUF."),
        ("llama", {"hidden_act": "gelu"}, "the llama model has the activation gelu, but llama.cpp computes this "
         "architecture with silu or swish; it cannot be exported to GGUF."),
        ("qwen2", {"rope_parameters": LLAMA3}, "the qwen2 model has rope scaling llama3, but llama.cpp computes this "
         "architecture with default or linear or yarn; it cannot be exported to GGUF."),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "the gpt2 model has scale_attn_by_inverse_layer_idx True, "
         "but llama.cpp computes this architecture with False; it cannot be exported to GGUF."),
    ],
)  # fmt: skip
def test_settings_that_llama_cpp_does_not_have(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        architecture_of(build(name, **settings).config)
    assert str(caught.value) == message
