"""What several tests build: tiny models with tokenizers, on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import quantc
from quantc.calibration.stream import CalibrationRun
from quantc.frontend import open_model, to_meta
from quantc.graph.derive import derive
from quantc.pipeline.calibrated_work import CalibratedWork
from quantc.pipeline.run import Run
from quantc.plan import Plan
from quantc.progress import LogProgress
from quantc.report import Report
from quantc.runtime.modules import unpack
from quantc.spec import QuantSpec
from tests.families import VOCAB
from tests.word_tokenizer import make_tokenizer


def thinned(cases: Sequence[Any], every: int, at: int = 0) -> list[Any]:
    """Return all cases for parametrize, each a tuple or one value; all but every so many are marked slow."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=() if index % every == at else pytest.mark.slow) for index, row in enumerate(rows)]


def tiny_text(words: int = 400, seed: int = 0) -> str:
    numbers = torch.randint(3, VOCAB, (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """The model, its tokenizer and a calibration text `text.txt` in a folder."""
    model.save_pretrained(folder)
    make_tokenizer(adds_bos=False).save_pretrained(folder)
    (folder / "text.txt").write_text(tiny_text())
    return folder


def quantize_saved(folder: Path, **settings: Any) -> Report:
    """Quantize what `save_with_tokenizer` put into `folder`/model, on its text, into `folder`/packed."""
    text = str(folder / "model/text.txt")
    head = {} if settings.get("plan") else {"head_bits": "keep"}  # the blocks are what most tests look at
    preset = {} if settings.get("recipe") else {"preset": "fast"}  # which rotates nothing
    settings = {"calib": text, "samples": 4, "seq_len": 32, **head, **preset, **settings}
    return quantc.quantize(folder / "model", out=folder / "packed", **settings)


def first_blocks(model: Path, blocks: int, folder: Path) -> Path:
    """Save the embedding, the first blocks and the head of a model, with its tokenizer: as good to quantize, sooner."""
    AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=blocks, dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def opened_run(folder: Path) -> Run:
    """A run on a model folder, its weights loaded and freed as in a real one; nothing is planned yet."""
    source = open_model(folder)
    graph = derive(source.model, source.load, to_meta)
    return Run(source, graph, Plan(), Report("tiny", "nowhere"), LogProgress())


def in_memory_run(model: PreTrainedModel, stored: torch.dtype = torch.float32, **spec: Any) -> Run:
    """A run on a model that stays loaded, every linear planned as `spec` says, as if its file held dtype `stored`."""
    for module in model.requires_grad_(False).modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    graph = derive(model, lambda _: None, lambda _: None)
    source: Any = SimpleNamespace(model=model, tied=dict(model.all_tied_weights_keys), stored_dtype=lambda _: stored)
    plan = Plan(dict.fromkeys(graph.linears, QuantSpec(**spec)))
    return Run(source, graph, plan, Report("tiny", "nowhere"), LogProgress())


def block_works(run: Run, tokens: torch.Tensor) -> Iterator[CalibratedWork]:
    """The blocks of such a run, each on the hidden states before the first one."""
    calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device)
    for block in run.graph.blocks:
        yield CalibratedWork(run, block, run.source.model.get_submodule(block.name), calibration)


def check_runs_as_unpacked(folder: Path, tokens: torch.Tensor) -> None:
    """A packed model gives the logits that it gives with its weights unpacked to floats, and generates."""
    packed = quantc.load(folder, dtype=torch.float32, verify=True)
    with torch.no_grad():
        found = packed(input_ids=tokens, use_cache=False).logits
        generated = packed.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
        expected = unpack(packed, torch.float32)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert generated.shape == (len(tokens), tokens.shape[1] + 3)


FORKS = """
import os, sys
from transformers import GenerationMixin, PreTrainedModel
for script in sys.argv[1:]:
    if not os.fork():
        exec(script)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, script
"""


def run_forked(*scripts: str) -> list[str]:
    """Return the lines that scripts print, each in a process that has transformers, and nothing of quantc yet.

    Torch and transformers take four seconds to import, so that one process imports them for all.
    """
    command = [sys.executable, "-c", FORKS, *scripts]
    environment = {**os.environ, "PYTHONPATH": str(Path(quantc.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
