"""Models compared with the first of them: size, perplexity, divergence, decode speed, and the error of each block.

The first stays in memory and runs again beside each of the others: keeping its predictions would take gigabytes (100
windows of 512 tokens and 49,152 logits each are 10 GB). So two models are in memory at a time, however many there are.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from ..errors import ModelError, UsageError
from ..frontend import Source
from ..frontend.gguf import GgufSource
from ..frontend.source import PathLike
from ..machine.compute_dtype import name_of
from ..progress import Progress
from . import llama_cpp
from .blocks import BlockErrors, Blocks, mismatch
from .comparison import DEQUANTIZED, FLOATS, LLAMA_CPP, PACKED, Compared, Comparison
from .decode_speed import measure_decode_speed
from .llama_cpp_model import LlamaCppModel
from .models import stored_size
from .scores import Scores, score
from .side_by_side import Reading, SideBySide

SPEED_CONTEXT = 128  # tokens that a measurement of the decode speed needs room for


def compare_models(names: Sequence[PathLike], reading: Reading, by_block: bool, progress: Progress) -> Comparison:
    """Return what a text shows of models beside the first of them; see api.compare."""
    if len(names) < 2:
        raise UsageError(
            f"{len(names)} model was named, but a comparison needs two or more; name another, or use `quantc eval`."
        )
    return _Comparing(SideBySide(names, reading, progress), by_block).run()


class _Comparing:
    """The first model in memory, and each of the others beside it, one after the other."""

    def __init__(self, models: SideBySide, by_block: bool):
        self._models, self._by_block = models, by_block

    def run(self) -> Comparison:
        models = self._models
        speed = self._speed_by_llama_cpp(0)
        reference = models.load(0)
        blocks = Blocks.of(reference, models.opened[0]) if self._by_block else None
        speed = speed or (measure_decode_speed(reference, models.tokenizer), "")
        others = [self._beside(at, reference, blocks) for at in range(1, len(models.names))]
        scores = others[0][0]
        assert scores.perplexity_original is not None
        first = self._compared(0, scores.perplexity_original, None, speed, None)
        return Comparison(
            [first, *(row for _, row in others)],
            models.reading.text,
            scores.positions,
            scores.windows,
            name_of(models.choice.dtype),
            models.choice.why,
            None if blocks is None else blocks.names,
            models.notes,
        )

    def _beside(self, at: int, reference: Any, blocks: Blocks | None) -> tuple[Scores, Compared]:
        models = self._models
        speed = self._speed_by_llama_cpp(at)
        model = models.load(at)
        scores, errors = self._scores(at, model, reference, blocks)
        speed = speed or (measure_decode_speed(model, models.tokenizer), "")
        del model
        gc.collect()  # modules refer to each other in circles, and the next model needs the room
        return scores, self._compared(at, scores.perplexity, scores, speed, errors)

    def _scores(self, at: int, model: Any, reference: Any, blocks: Blocks | None) -> tuple[Scores, list[float] | None]:
        models, name = self._models, self._models.names[at]
        stage = f"compare {name}"
        if blocks is None:
            return score(model, reference, models.windows, models.progress, stage), None
        own = Blocks.of(model, models.opened[at])
        if (why := mismatch(own, blocks, models.windows[0].tokens)) is not None:
            why = why.replace("the original", models.names[0])
            models.notes.append(f"{name} has no errors by block: {why}")
            return score(model, reference, models.windows, models.progress, stage), None
        errors = BlockErrors(blocks, own)
        with errors.watching():
            scores = score(model, reference, models.windows, models.progress, stage)
        return scores, errors.errors()

    def _compared(
        self, at: int, perplexity: float, scores: Scores | None, speed: tuple[float, str], errors: list[float] | None
    ) -> Compared:
        opened = self._models.opened[at]
        runs_on = FLOATS if isinstance(opened, Source) else PACKED
        return Compared(
            model=self._models.names[at],
            runs_on=DEQUANTIZED if isinstance(opened, GgufSource) else runs_on,
            perplexity=perplexity,
            tokens_per_second=speed[0],
            speed_by=speed[1],
            block_errors=errors,
            mean_kl=None if scores is None else scores.mean_kl,
            p99_kl=None if scores is None else scores.p99_kl,
            top1_agreement=None if scores is None else scores.top1_agreement,
            **stored_size(opened),
        )

    def _speed_by_llama_cpp(self, at: int) -> tuple[float, str] | None:
        """Return the decode speed of a GGUF file in llama.cpp, where its users run it; None for anything else.

        It comes before the model is loaded, so that llama.cpp's copy is gone by then.
        """
        models, opened = self._models, self._models.opened[at]
        if not isinstance(opened, GgufSource) or models.reading.device != "cpu" or llama_cpp.missing() is not None:
            return None
        try:
            runner: Any = LlamaCppModel(opened, SPEED_CONTEXT)
        except ModelError as error:
            models.notes.append(f"{models.names[at]} was decoded by transformers: {error}")
            return None
        try:
            return measure_decode_speed(runner, models.tokenizer), LLAMA_CPP
        finally:
            runner.close()
