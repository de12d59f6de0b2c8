"""Every pass on tiny models of every decoder family: one recipe with all of them, written, loaded, same logits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import quantc
from quantc.checkpoint.reader import CheckpointReader
from quantc.numerics.hadamard import block_order
from quantc.passes.rotate import SMALLEST_BLOCK
from quantc.recipe import Recipe
from quantc.report import Report
from tests.families import FAMILIES, build
from tests.helpers import quantize_saved, save_with_tokenizer, thinned
from tests.quantc.graph.test_rewrite import CHANGED, EXPECTED, KINDS, REFUSED, SHARED
from tests.whole.test_families import TOKENS, put_rounded_weights

RECIPE = Recipe.from_dict(
    {
        "version": 1,
        "passes": [
            {"allocate": {"bits": 8, "group_size": 32}},
            "importance",
            "scale",
            "rotate",
            {"compensate": {"rank": 2}},
            {"quantize": {"rounds": 1, "shrink": 0.1, "correct": 0.5}},
        ],
    }
)
PROVEN = {CHANGED, SHARED}  # reasons that only show when a fold is tried, which needs scales that help
DENSE, ROUTED = 0.03, 0.15  # relative distance of logits at 8 bits; rounding turns a few choices of experts


def put_stored_weights(model: PreTrainedModel, folder: Path) -> None:
    """Replace the float model's weights by the checkpoint's: packed ones as rounded, the others as they were folded."""
    reader = CheckpointReader(folder)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in reader.weight_map:
            tensor.data = reader.tensor(name)
    put_rounded_weights(model, folder)


def check_report(name: str, report: Report) -> None:
    """What the passes say they did: specs, and that no more was folded, and no other refused, than can be."""
    for linear in report.linears:
        order = block_order(linear.shape[1])
        assert linear.spec.hadamard == (order if order >= SMALLEST_BLOCK else 0)
        assert linear.spec.rank == min(2, *linear.shape)
    assert report.rewrites["importance"]["activations"] > 0
    folded = report.rewrites.get("scale", {})
    assert folded.keys() <= set(KINDS)
    assert all(folded.get(kind, 0) <= most for kind, most in zip(KINDS, EXPECTED[name], strict=True))
    refused = {re.sub(r"^scale .*?\.\d+\.", "", label): reason for label, reason in report.refused.items()}
    possible = {f"{reader}:in": reason for reader, reason in REFUSED.get(name, {}).items()}
    assert refused.items() <= possible.items()
    assert {label for label, reason in possible.items() if reason not in PROVEN} <= refused.keys()


@pytest.mark.usefixtures("rotation_pays")
@pytest.mark.parametrize("name", thinned(list(FAMILIES), every=4))
def test_all_passes_together_give_the_logits_of_the_rounded_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantc.frontend.auto.AutoTokenizer", PreTrainedTokenizerFast)
    model = build(name)
    save_with_tokenizer(model, tmp_path / "model")
    report = quantize_saved(tmp_path, recipe=RECIPE)
    check_report(name, report)
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    with torch.no_grad():
        original = model(input_ids=TOKENS, use_cache=False).logits
        found = packed(input_ids=TOKENS, use_cache=False).logits
        put_stored_weights(model, tmp_path / "packed")
        expected = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    limit = ROUTED if "moe" in FAMILIES[name].traits else DENSE
    assert (found - original).norm() < limit * original.norm()
