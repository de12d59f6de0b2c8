"""kl: losses measured, one change at a time. Slow, and what the other estimators are judged by.

A variant is the model with one linear rounded as one candidate says, all output channels of it. One sweep over the
blocks runs all of them: a block is loaded once, the variants made in earlier blocks pass through it, and each of its
own starts from the hidden states before it. Its loss is the KL divergence of its predictions from the original's.
Matrix products are float32 and hidden states are stored so: bfloat16's own divergence is larger than that of one linear
in 8 bits.

Memory holds one block (and its rounded weights, given a base), or the tensors outside the blocks and the logits of two
samples. On disk are SAMPLES * T * width * 4 bytes for each variant: 6 GB for SmolLM2-135M (210 linears, 6 candidates,
512 tokens a sample). Time grows with the square of the number of blocks.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch.func import functional_call

from ..calibration.hidden_states import HiddenStates
from ..calibration.stream import CalibrationRun
from ..errors import CalibrationError
from ..graph.model_graph import Linear
from ..graph.rewrite import weight_name
from ..numerics.statistics import Gram
from ..pipeline.run import Run, output_logits
from ..pipeline.work import BlockWork
from ..spec import QuantSpec
from .base import Candidate, Candidates, Losses, errors, original_blocks

SAMPLES = 4  # of the calibration set, on which the divergence is measured
CHUNK_VALUES = 2**23  # logits converted to float64 at a time: 64 MiB
ORIGINAL, START, FIRST = 0, 1, 2  # slots of the state file: START is what variants start from, FIRST the first one's

Weights = dict[str, torch.Tensor]  # by their names inside the block, as the model stores them


def measure(run: Run, tokens: torch.Tensor, folder: Path, candidates: Candidates, base: int | None = None) -> Losses:
    """Return candidates of every linear that the plan quantizes, with losses: mean KL(original || variant) in nats.

    tokens: the calibration set (samples, T). The first SAMPLES are measured on, the others guide the rounding; where
    there are no others, the same do both. folder: for temporary files, see above.
    base: code width of all other linears, rounded as they are planned; a loss is then what the variant has more than
    the model with that one linear unrounded, and 0 where it has less. None leaves the others as they are.

    Raises CalibrationError for a variant whose predictions are not finite.
    """
    measured = tokens[:SAMPLES]
    guides = tokens[SAMPLES:] if len(tokens) > SAMPLES else tokens
    calibration = CalibrationRun(run.source.model, run.graph, guides, run.device, folder)
    run.progress.stage("Sensitivity", len(run.graph.blocks) + len(measured))
    with closing(_Variants(run, measured, folder, candidates, base)) as variants:
        for work in original_blocks(run, calibration):
            work.keep_statistics = base is not None
            variants.through(work)
        found = variants.losses()
    run.progress.done()
    return found


class _Variants:
    """The measured samples on their way through the original model, and through every variant of it."""

    def __init__(self, run: Run, tokens: torch.Tensor, folder: Path, candidates: Candidates, base: int | None):
        self.run, self.tokens, self.candidates, self.base = run, tokens, candidates, base
        self._made: list[tuple[str, QuantSpec | None]] = []  # linear and candidate; None leaves it unrounded
        self._calibration = CalibrationRun(run.source.model, run.graph, tokens, run.device, folder)
        samples, *rest = self._calibration.state_shape
        self._file = HiddenStates((self._slots() * samples, *rest), folder, in_file=True)
        for start, hidden in self._calibration.states():
            for slot in (ORIGINAL, START):
                self._file.write(slot * len(tokens) + start, hidden)

    def _slots(self) -> int:
        """Return how many slots, each for the hidden states of all samples, are needed."""
        specs = self.run.plan.specs
        planned = [linear for name, linear in self.run.graph.linears.items() if specs[name] is not None]
        variants = [self.candidates(linear) for linear in planned]
        return FIRST + sum(len(found) + bool(found and self.base is not None) for found in variants)

    def close(self) -> None:
        self._file.close()

    def through(self, work: BlockWork) -> None:
        """Take all variants through a block and make those of its linears; the block is left as the base has it."""
        based = self._base_weights(work)
        self._advance(work, {}, ORIGINAL, ORIGINAL)
        for at in range(len(self._made)):
            self._advance(work, based, FIRST + at, FIRST + at)
        for item, grams in work.statistics():
            for linear in work.readers(item):
                self._vary(work, linear, grams, based)
        self._advance(work, based, START, START)
        for name, weight in based.items():
            work.module.get_parameter(name).data = weight

    def _base_weights(self, work: BlockWork) -> Weights:
        if self.base is None:
            return {}
        specs = self.run.plan.specs
        return {
            weight_name(work.block, linear): _rounded(work, linear, grams, replace(spec, bits=self.base))
            for item, grams in work.statistics()
            for linear in work.readers(item)
            if (spec := specs[linear.name]) is not None
        }

    def _vary(self, work: BlockWork, linear: Linear, grams: list[Gram], based: Weights) -> None:
        name = weight_name(work.block, linear)
        specs = self.candidates(linear)
        if based and specs:
            self._make(work, linear, None, {other: based[other] for other in based if other != name})
        for spec in specs:
            self._make(work, linear, spec, {**based, name: _rounded(work, linear, grams, spec)})

    def _make(self, work: BlockWork, linear: Linear, spec: QuantSpec | None, weights: Weights) -> None:
        self._advance(work, weights, START, FIRST + len(self._made))
        self._made.append((linear.name, spec))

    def _advance(self, work: BlockWork, weights: Weights, source: int, target: int) -> None:
        """Run a block with other weights from the hidden states in one slot, and put its outputs into another."""
        for batch, call in self._calibration.calls(work.block):
            hidden = self._file.read(source * len(self.tokens) + batch.start, batch.count, self.run.device)
            called = call.with_hidden(hidden)
            with torch.no_grad():
                output = functional_call(work.module, weights, called.args, called.kwargs)
            self._file.write(target * len(self.tokens) + batch.start, work.block.returns.unwrap(output, called))

    def losses(self) -> Losses:
        """Return the losses of the variants, once they are through all blocks."""
        found = dict(zip(self._made, self._divergences(), strict=True))
        return Losses({
            name: [
                Candidate(spec, max(0.0, found[name, spec] - found.get((name, None), 0.0)))
                for spec in self.candidates(self.run.graph.linears[name])
            ]
            for name in dict(self._made)
        })  # fmt: skip

    def _divergences(self) -> list[float]:
        """Return every variant's divergence from the original, in nats per token."""
        totals = [0.0] * len(self._made)
        with self.run.outside_loaded():
            for sample in range(len(self.tokens)):
                expected = self._logits(sample, ORIGINAL)
                for at, variant in enumerate(self._made):
                    totals[at] += _finite(divergence(expected, self._logits(sample, FIRST + at)), *variant)
                self.run.progress.step(f"sample {sample + 1}")
        return [total / self.tokens.numel() for total in totals]

    def _logits(self, sample: int, slot: int) -> torch.Tensor:
        hidden = self._file.read(slot * len(self.tokens) + sample, 1, self.run.device)
        with torch.no_grad():
            return output_logits(self.run, self.tokens[sample : sample + 1], hidden)[0]


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Return KL(expected || logits) for logits (T, V), in nats, summed over T; float64, as the terms nearly cancel."""
    rows = max(1, CHUNK_VALUES // logits.shape[-1])
    total = 0.0
    for ours, theirs in zip(expected.split(rows), logits.split(rows), strict=True):
        log_p, log_q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


def _finite(found: float, linear: str, spec: QuantSpec | None) -> float:
    if not math.isfinite(found):
        stored = "unrounded" if spec is None else f"stored as {spec.label()}"
        raise CalibrationError(
            f"with {linear} {stored} the model's predictions are NaN or infinite, but losses need finite ones; "
            "allow no fewer bits than this model bears, or check that it runs in float32 on this text."
        )
    return found


def _rounded(work: BlockWork, linear: Linear, grams: list[Gram], spec: QuantSpec) -> torch.Tensor:
    """Return all of a linear's rounded weight, or of a stack's, as the model stores it."""
    experts = []
    for expert, gram in enumerate(grams):
        weight = work.weight(linear, expert)
        experts += [weight + error for _, error in errors(work, weight, gram, [spec])]
    whole = torch.stack(experts) if linear.kind == "stack" else experts[0]
    return whole.mT if linear.transposed else whole
