"""SmolLM2-135M-Instruct, the real model: perplexity gates as ratios to the unquantized model in the same run.

Its published weights lie on a 4-bit grid of 32-blocks, so groups of 64 are used and 3 and 2 bits say more than 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import quantc
from quantc.evaluation.scores import Scores, score
from quantc.evaluation.text import read_text
from quantc.evaluation.windows import make_windows
from quantc.frontend import Source, open_model
from quantc.progress import LogProgress
from quantc.runtime.modules import unpack

MODEL = "demo:smollm2"
TEXT = Path(__file__).parents[2] / "examples/demo.txt"
CONTEXT = 256


@dataclass
class Lab:
    """The unquantized model, and a way to score a quantized one against it."""

    source: Source
    folder: Path

    def __post_init__(self) -> None:
        self.original = self.source.load_whole(torch.float32)
        self.windows = make_windows(self.source.tokenizer, read_text(str(TEXT)), CONTEXT, None, None)

    def scores(self, bits: int, method: str) -> Scores:
        out = self.folder / f"{method}-{bits}"
        quantc.quantize(MODEL, bits=bits, group_size=64, method=method, samples=16, seq_len=256, out=out)
        packed = quantc.load(out, dtype=torch.float32)
        return score(packed, self.original, self.windows, LogProgress())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(open_model(MODEL), tmp_path_factory.mktemp("smollm2"))


@pytest.mark.slow
def test_four_bits_cost_little(lab: Lab) -> None:
    found = lab.scores(4, "gptq")
    assert found.perplexity_original is not None
    assert found.mean_kl is not None
    assert found.perplexity < 1.10 * found.perplexity_original
    assert found.mean_kl < 0.10


@pytest.mark.slow
def test_three_bits_gptq_has_at_most_half_the_divergence_of_rounding_to_nearest(lab: Lab) -> None:
    gptq, nearest = lab.scores(3, "gptq"), lab.scores(3, "rtn")
    assert gptq.perplexity_original is not None
    assert gptq.mean_kl is not None
    assert nearest.mean_kl is not None
    assert gptq.mean_kl <= 0.5 * nearest.mean_kl
    assert gptq.perplexity < 1.8 * gptq.perplexity_original


@pytest.mark.slow
def test_two_bits_still_speak(lab: Lab) -> None:
    gptq, nearest = lab.scores(2, "gptq"), lab.scores(2, "rtn")
    assert gptq.perplexity_original is not None
    assert gptq.perplexity < 60 * gptq.perplexity_original
    assert gptq.perplexity < 0.1 * nearest.perplexity


@pytest.mark.slow
def test_packed_weights_write_the_text_of_the_dequantized_model(lab: Lab) -> None:
    out = lab.folder / "greedy"
    quantc.quantize(MODEL, bits=4, group_size=64, method="rtn", out=out)
    prompt = lab.source.tokenizer("The harbour silts up twice a year, and", return_tensors="pt").input_ids
    settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    settings |= {"max_new_tokens": 100, "min_new_tokens": 100}
    packed = quantc.load(out, dtype=torch.float32).generate(prompt, **settings)
    dense = unpack(quantc.load(out, dtype=torch.float32), torch.float32).generate(prompt, **settings)
    assert torch.equal(packed, dense)
