from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantc.errors import CalibrationError, UsageError
from quantc.evaluation import scores as scoring
from quantc.evaluation.scores import Scores, peak_rss_bytes, score, summarize
from quantc.evaluation.windows import Window, make_windows
from quantc.machine.compute_dtype import Choice
from quantc.progress import LogProgress
from tests.families import VOCAB, build
from tests.word_tokenizer import make_tokenizer, to_text


@pytest.fixture(scope="module")
def text() -> list[int]:
    return torch.randint(3, VOCAB, (150,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    """The model before noise, as it were: they agree on most tokens, not on all."""
    return add_noise(build("llama"), 0.02)


def add_noise(model: PreTrainedModel, scale: float) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def windows(text: list[int]) -> list[Window]:
    return make_windows(make_tokenizer(adds_bos=False), [to_text(text)], context=32)


def logits64(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens[None]).logits[0].double()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_perplexity_is_that_of_transformers_loss(model: PreTrainedModel, text: list[int], adds_bos: bool) -> None:
    windows = make_windows(make_tokenizer(adds_bos=adds_bos), [to_text(text)], context=32)
    with torch.no_grad():
        losses = [model(w.tokens[None], labels=w.tokens[None]).loss.double() for w in windows]
    scores = score(model, None, windows, LogProgress())
    assert scores.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert (scores.positions, scores.windows) == (31 * len(windows), len(windows))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_sliding_perplexity_is_that_of_a_plain_loop(model: PreTrainedModel, text: list[int], adds_bos: bool) -> None:
    context, stride = 32, 10
    bos = [1] if adds_bos else []
    first, body = 1 - len(bos), context - len(bos)
    total, count, done = 0.0, 0, first
    for start in range(0, len(text) - body + 1, stride):
        log_probs = logits64(model, torch.tensor(bos + text[start : start + body])).log_softmax(1)
        for target in range(done, start + body):
            total -= float(log_probs[target - start + len(bos) - 1, text[target]])
            count += 1
        done = start + body
    windows = make_windows(make_tokenizer(adds_bos=adds_bos), [to_text(text)], context, stride)
    scores = score(model, None, windows, LogProgress())
    assert scores.positions == count == done - first
    assert scores.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)


def test_stories_weigh_by_their_positions(model: PreTrainedModel, text: list[int]) -> None:
    stories = [text[:5], text[5:60], text[60:80]]
    chosen: list[float] = []
    for story in stories:
        log_probs = logits64(model, torch.tensor([1, *story]))[:-1].log_softmax(1)
        chosen += log_probs[range(len(story)), story].tolist()
    windows = make_windows(make_tokenizer(adds_bos=True), list(map(to_text, stories)), context=64)
    scores = score(model, None, windows, LogProgress())
    assert scores.positions == len(chosen) == 80
    assert scores.perplexity == pytest.approx(math.exp(-sum(chosen) / 80), rel=1e-6)


def test_comparison_is_that_of_float64(
    model: PreTrainedModel, original: PreTrainedModel, windows: list[Window]
) -> None:
    p = torch.cat([logits64(original, w.tokens)[:-1] for w in windows]).log_softmax(1)
    q = torch.cat([logits64(model, w.tokens)[:-1] for w in windows]).log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1)
    targets = torch.cat([w.tokens[1:] for w in windows])
    scores = score(model, original, windows, LogProgress())
    assert scores.mean_kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert scores.p99_kl == pytest.approx(float(kl.quantile(0.99)), rel=1e-6)
    assert scores.top1_agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
    assert 0 < scores.top1_agreement < 1
    nll = -p.gather(1, targets[:, None]).mean()
    assert scores.perplexity_original == pytest.approx(float(nll.exp()), rel=1e-6)
    assert scores.perplexity == score(model, None, windows, LogProgress()).perplexity


def test_a_model_agrees_with_itself(model: PreTrainedModel, windows: list[Window]) -> None:
    scores = score(model, model, windows, LogProgress())
    assert (scores.mean_kl, scores.p99_kl, scores.top1_agreement) == (0.0, 0.0, 1.0)
    assert scores.perplexity == scores.perplexity_original


def test_without_original_there_is_no_comparison(model: PreTrainedModel, windows: list[Window]) -> None:
    scores = score(model, None, windows, LogProgress())
    assert (scores.perplexity_original, scores.mean_kl, scores.p99_kl, scores.top1_agreement) == (None,) * 4


def test_divergence_grows_with_the_noise(model: PreTrainedModel, windows: list[Window]) -> None:
    small, large = (
        score(add_noise(build("llama"), scale), model, windows, LogProgress()).mean_kl for scale in (1e-3, 1e-2)
    )
    assert 0 < 10 * small < large


@pytest.mark.parametrize("values", [1, VOCAB * 2, VOCAB * 7 + 3])
def test_chunks_do_not_change_the_scores(
    model: PreTrainedModel,
    original: PreTrainedModel,
    windows: list[Window],
    values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = score(model, original, windows, LogProgress())
    monkeypatch.setattr(scoring, "CHUNK_VALUES", values)
    chunked = score(model, original, windows, LogProgress())
    assert chunked.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
    assert chunked.perplexity_original == pytest.approx(whole.perplexity_original, rel=1e-12)
    assert (chunked.mean_kl, chunked.p99_kl) == (whole.mean_kl, whole.p99_kl)
    assert chunked.top1_agreement == whole.top1_agreement


def test_bfloat16_logits_are_cast_to_float32(windows: list[Window], original: PreTrainedModel) -> None:
    model = build("llama").bfloat16()
    p = torch.cat([logits64(original, w.tokens)[:-1] for w in windows]).log_softmax(1)
    q = torch.cat([logits64(model, w.tokens)[:-1] for w in windows]).log_softmax(1)
    scores = score(model, original, windows, LogProgress())
    assert scores.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)


def test_original_runs_first_on_each_window(
    original: PreTrainedModel, windows: list[Window], model: PreTrainedModel
) -> None:
    runs: list[tuple[str, list[int]]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _, __, options: runs.append((name, options["input_ids"][0].tolist()))

    hooks = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in (("model", model), ("original", original))
    ]
    score(model, original, windows[:2], LogProgress())
    for hook in hooks:
        hook.remove()
    expected = [(name, window.tokens.tolist()) for window in windows[:2] for name in ("original", "model")]
    assert runs == expected


def test_no_logits_outlive_their_window(
    original: PreTrainedModel, windows: list[Window], model: PreTrainedModel
) -> None:
    logits: list[weakref.ref[object]] = []
    alive: list[int] = []

    def count(_: object, __: object) -> None:
        alive.append(sum(tensor() is not None for tensor in logits))

    def remember(_: object, __: object, output: Tensor) -> None:
        logits.append(weakref.ref(output.untyped_storage()))

    hooks = [module.register_forward_pre_hook(count) for module in (original, model)]
    hooks += [module.get_output_embeddings().register_forward_hook(remember) for module in (original, model)]
    score(model, original, windows, LogProgress())
    for hook in hooks:
        hook.remove()
    assert alive == [0, 1] * len(windows)


@pytest.mark.parametrize("whose", ["model", "original"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(
    model: PreTrainedModel, original: PreTrainedModel, windows: list[Window], whose: str, value: float
) -> None:
    calls = 0

    def spoil_second_run(_: object, __: object, output: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            output.logits[0, 3, 7] = value

    hook = (model if whose == "model" else original).register_forward_hook(spoil_second_run)
    with pytest.raises(CalibrationError) as caught:
        score(model, original, windows, LogProgress())
    hook.remove()
    assert str(caught.value) == (
        f"the logits of the {whose} are NaN or infinite in window 2 of 4 of the evaluation text "
        f"(1 of {31 * VOCAB}), but perplexity needs finite ones; try --dtype float32, or repair the weights."
    )


def test_windows_longer_than_the_model_can_see(model: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match="--context is 129 tokens, but the model has only 128 positions"):
        score(model, None, [Window(torch.zeros(129, dtype=torch.int64), 128)], LogProgress())


def test_models_of_different_vocabularies(model: PreTrainedModel, windows: list[Window]) -> None:
    other = build("llama")
    other.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    with pytest.raises(UsageError) as caught:
        score(model, other, windows, LogProgress())
    assert "the model has 160 logits per token and the original 168, but KL divergence needs one" in str(caught.value)


def test_hopeless_models_have_infinite_perplexity(windows: list[Window]) -> None:
    model = build("llama")
    model.get_output_embeddings().weight.data *= 1e5
    assert score(model, None, windows, LogProgress()).perplexity == math.inf


def test_progress_counts_windows(model: PreTrainedModel, windows: list[Window]) -> None:
    class Recorder(LogProgress):
        events: list[object] = []  # noqa: RUF012

        def stage(self, name: str, total: int) -> None:
            self.events.append((name, total))

        def step(self, name: str) -> None:
            self.events.append(name)

        def done(self) -> None:
            self.events.append("done")

    recorder = Recorder()
    scores = score(model, None, windows, recorder)
    assert recorder.events[0] == ("evaluate", 4)
    assert recorder.events[4:] == [f"perplexity {scores.perplexity:.2f}", "done"]


def test_summary_is_scores_and_costs(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "measure_decode_speed", lambda *_: 3.5)
    monkeypatch.setattr(scoring, "peak_rss_bytes", lambda: 99)
    scores = Scores(20.0, 19.0, 0.1, 0.9, 0.8, 511, 1)
    computed, tokenizer = Choice(torch.float32, "a reason"), make_tokenizer(adds_bos=True)
    result = summarize(scores, model, tokenizer, computed, bits_per_weight=4.25, weights_bytes=10)
    assert json.loads(json.dumps(result.to_dict())) == {
        "perplexity": 20.0, "perplexity_original": 19.0, "mean_kl": 0.1, "p99_kl": 0.9,
        "top1_agreement": 0.8, "positions": 511, "windows": 1, "bits_per_weight": 4.25,
        "weights_bytes": 10, "tokens_per_second": 3.5, "peak_rss_bytes": 99,
        "dtype": "float32", "dtype_reason": "a reason", "tasks": [],
    }  # fmt: skip


def test_peak_memory_is_in_bytes() -> None:
    before = peak_rss_bytes()
    ballast = torch.ones(before // 4 + 2**24)  # four bytes each: more than was ever held, and 64 MiB
    assert before + 2**24 < peak_rss_bytes() < 2**44
    del ballast
