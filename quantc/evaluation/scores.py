"""Perplexity of a model, and how far it has moved from the original: KL divergence and top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CalibrationError, UsageError
from ..frontend.token_ids import check_ids
from ..machine.compute_dtype import Choice, name_of
from ..machine.memory import peak_rss_bytes
from ..numerics.statistics import all_finite
from ..progress import Progress
from .decode_speed import measure_decode_speed
from .tasks import TaskScore
from .text import read_text
from .windows import Window, check_context, make_windows

__all__ = [
    "Evaluation",
    "Scores",
    "Window",
    "check_context",
    "check_ids",
    "make_windows",
    "measure_decode_speed",
    "peak_rss_bytes",
    "read_text",
    "score",
    "summarize",
]

# Logits converted to float32 log-probabilities at a time: 64 MiB for each of the few tensors alive at once. All
# of a window would be 512 MiB each, at 512 tokens and a vocabulary of 262144.
CHUNK_VALUES = 2**24


@dataclass(frozen=True)
class Scores:
    """What the predictions over all windows say; the four figures in the middle are None without an original.

    mean_kl, p99_kl: mean and 99th percentile over positions of KL(original || model), in nats.
    top1_agreement: share of positions where both find the same token likeliest.
    positions: predictions scored. windows: that they are in.
    """

    perplexity: float
    perplexity_original: float | None
    mean_kl: float | None
    p99_kl: float | None
    top1_agreement: float | None
    positions: int
    windows: int


@dataclass(frozen=True)
class Evaluation(Scores):
    """Scores, and what the model costs.

    bits_per_weight: all that is stored for the linears inside the blocks over their weight count.
    weights_bytes: size of the weight files. tokens_per_second: see `measure_decode_speed`.
    dtype: that the models were computed in. dtype_reason: why in that one, where nobody named it and it is not plain.
    tasks: what was scored on tasks. Without a text there are no positions and no windows, and the perplexity is NaN.
    """

    bits_per_weight: float
    weights_bytes: int
    tokens_per_second: float
    peak_rss_bytes: int
    dtype: str
    dtype_reason: str
    tasks: tuple[TaskScore, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


NO_TEXT = Scores(math.nan, None, None, None, None, positions=0, windows=0)


@torch.no_grad()
def score(
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    windows: Sequence[Window],
    progress: Progress,
    stage: str = "evaluate",
) -> Scores:
    """Run the original, if there is one, and the model over each window and compare what they predict.

    Log-probabilities are float32, sums float64. Besides the models it holds the logits of one window, in the
    dtype the models give them. stage: what the progress calls it.

    Raises UsageError for windows longer than the model's context and for models of different vocabularies,
    CalibrationError that names the window for logits that are NaN or infinite.
    """
    check_context(model, max(len(window.tokens) for window in windows))
    tally = _Tally()
    progress.stage(stage, len(windows))
    for number, window in enumerate(windows, start=1):
        _score_window(model, original, window, tally, f"window {number} of {len(windows)}")
        progress.step(f"perplexity {_exp(tally.nll / tally.positions):.2f}")
    progress.done()
    return tally.scores(len(windows))


def summarize(
    scores: Scores,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    computed: Choice,
    *,
    bits_per_weight: float,
    weights_bytes: int,
    tasks: tuple[TaskScore, ...] = (),
) -> Evaluation:
    """Return the scores of a model with its costs; decode speed and memory are measured here."""
    return Evaluation(
        **vars(scores),
        bits_per_weight=bits_per_weight,
        weights_bytes=weights_bytes,
        tokens_per_second=measure_decode_speed(model, tokenizer),
        peak_rss_bytes=peak_rss_bytes(),
        dtype=name_of(computed.dtype),
        dtype_reason=computed.why,
        tasks=tasks,
    )


def _score_window(
    model: PreTrainedModel, original: PreTrainedModel | None, window: Window, tally: _Tally, where: str
) -> None:
    # This is a function so that a window's logits are freed before the next window's are computed.
    expected = None if original is None else _predict(original, window)
    tally.add(_predict(model, window), expected, window.tokens[-window.scored :], where)


@dataclass
class _Tally:
    """Sums over positions of negative log-likelihoods in nats and agreements; KL by position, float32."""

    positions: int = 0
    nll: float = 0.0
    nll_original: float = 0.0
    agreed: int = 0
    kl: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, expected: Tensor | None, targets: Tensor, where: str) -> None:
        """Count the predictions of a window: logits and expected (T, V), targets (T,)."""
        if expected is not None and expected.shape != logits.shape:
            raise UsageError(
                f"the model has {logits.shape[1]} logits per token and the original {expected.shape[1]}, but KL "
                "divergence needs one vocabulary; compare with the model this one was made from."
            )
        rows = max(1, CHUNK_VALUES // logits.shape[1])
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            log_q = _log_softmax(logits[chunk], "model", where)
            self.nll += _nll(log_q, targets[chunk])
            if expected is not None:
                log_p = _log_softmax(expected[chunk], "original", where).to(log_q.device)
                self.nll_original += _nll(log_p, targets[chunk])
                self._compare(log_p, log_q)
        self.positions += len(targets)

    def _compare(self, log_p: Tensor, log_q: Tensor) -> None:
        self.agreed += int((log_p.argmax(dim=1) == log_q.argmax(dim=1)).sum())
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1, dtype=torch.float64)
        self.kl.append(kl.float().cpu())

    def scores(self, windows: int) -> Scores:
        perplexity = _exp(self.nll / self.positions)
        if not self.kl:
            return Scores(perplexity, None, None, None, None, self.positions, windows)
        kl = torch.cat(self.kl).double().numpy()
        return Scores(
            perplexity=perplexity,
            perplexity_original=_exp(self.nll_original / self.positions),
            mean_kl=float(kl.mean()),
            p99_kl=float(np.quantile(kl, 0.99)),
            top1_agreement=self.agreed / self.positions,
            positions=self.positions,
            windows=windows,
        )


def _predict(model: PreTrainedModel, window: Window) -> Tensor:
    """Return logits (scored, V) of the predictions that count, in the model's dtype."""
    tokens = window.tokens.to(model.device).unsqueeze(0)
    return model(input_ids=tokens, use_cache=False).logits[0, -window.scored - 1 : -1]


def _log_softmax(logits: Tensor, whose: str, where: str) -> Tensor:
    if not all_finite(logits):
        bad = int((~torch.isfinite(logits)).sum())
        raise CalibrationError(
            f"the logits of the {whose} are NaN or infinite in {where} of the evaluation text "
            f"({bad} of {logits.numel()}), but perplexity needs finite ones; "
            "try --dtype float32, or repair the weights."
        )
    return logits.float().log_softmax(dim=1)


def _nll(log_probs: Tensor, targets: Tensor) -> float:
    chosen = log_probs.gather(1, targets.to(log_probs.device).unsqueeze(1))
    return -float(chosen.sum(dtype=torch.float64))


def _exp(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 709 else math.inf  # beyond what a float holds
