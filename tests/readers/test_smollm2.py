"""SmolLM2-135M-Instruct, whole: every reader computes from its folder what quantc computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantc
from quantc.export.probe import logits_of, measure, probe_tokens, tokenizer_of
from tests.readers import environments, lab
from tests.readers.claims import CLAIMS, Claim

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """The model in codes that every target holds, tokens (T,) of a text, and their logits (T, V) by quantc."""
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("smollm2") / "packed"
    lab.quantize("demo:smollm2", out, bits=4, group_size=64, symmetric=True)
    model = quantc.load(out, dtype=torch.float32).eval()
    tokens = probe_tokens(tokenizer_of(out), model.config)
    return out, tokens, logits_of(model, tokens)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_a_real_model_is_the_same_there(
    claim: Claim, packed: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    environments.require(claim.reader)
    checkpoint, tokens, expected = packed
    quantc.export(checkpoint, to=claim.target, out=tmp_path / "folder")
    (answer,) = environments.ask(claim.reader, [tmp_path / "folder"], tokens)
    assert isinstance(answer, torch.Tensor), answer
    found = measure(expected, answer, None)
    assert found.error <= claim.error
    assert found.same_top >= 0.97
