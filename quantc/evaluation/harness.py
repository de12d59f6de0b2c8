"""lm-eval as quantc uses it: a model that is loaded already, bars as quantc's progress, and none of its log lines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import CalibrationError, UsageError
from ..frontend.gguf_transformers import replaced
from ..numerics.statistics import all_finite
from ..progress import Progress

PACKAGE, LEAST = "lm-eval", "0.4.13"
STEPS = 100  # that a stage of many requests is shown in
BATCH_VALUES = 2**26  # logits of a batch, 256 MiB in float32, were each of its rows this many tokens:
ROW_TOKENS = 256
MOST_ROWS = 16


def check_installed() -> None:
    """Raise UsageError where lm-eval is not installed, or is older than the first version this was tried with."""
    try:
        found = version(PACKAGE)
    except PackageNotFoundError as error:
        raise UsageError(
            f"--tasks needs the package {PACKAGE}, which is not installed; run `pip install {PACKAGE}`."
        ) from error
    if _release(found) < _release(LEAST):
        raise UsageError(
            f"{PACKAGE} {found} is installed, and --tasks needs {LEAST} or newer; run `pip install --upgrade "
            f"{PACKAGE}`."
        )


def _release(text: str) -> list[int]:
    return [int(part) for part in text.split(".") if part.isdecimal()]


def as_language_model(model: Any, tokenizer: Any) -> Any:
    """Return lm-eval's face of a transformers model: log-probabilities in float32, rows as memory allows.

    Its scores of NaN would look like any others, so a model that computes NaN or infinity raises CalibrationError.
    """
    from lm_eval.models.huggingface import HFLM

    class Checked(HFLM):
        def _model_call(self, *inputs: Any, **settings: Any) -> Any:
            logits = super()._model_call(*inputs, **settings)
            if not all_finite(logits):
                raise CalibrationError(
                    "the logits of the model are NaN or infinite in a task, but scores need finite ones; try --dtype "
                    "float32, or repair the weights."
                )
            return logits

    rows = batch_rows(model.config.get_text_config().vocab_size)
    return Checked(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=rows, softmax_dtype="float32")


def batch_rows(vocabulary: int) -> int:
    """Return how many texts to run at a time: their logits take most of the memory."""
    return max(1, min(MOST_ROWS, BATCH_VALUES // (ROW_TOKENS * vocabulary)))


@contextmanager
def quiet(progress: Progress | None = None) -> Iterator[None]:
    """Keep lm-eval's log lines and bars away for the context; bars over requests become stages of the progress."""
    import datasets
    import lm_eval.models.huggingface

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("lm_eval.") and hasattr(module, "tqdm"):
                    shown = progress if module is lm_eval.models.huggingface else None
                    stack.enter_context(replaced(module, "tqdm", Bars(shown)))
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


class Bars:
    """Makes bars with the face of tqdm's. A bar inside another one is not shown."""

    def __init__(self, progress: Progress | None):
        self.progress = progress
        self.shown = False

    def __call__(self, items: Iterable[Any] = (), total: int | None = None, **_: Any) -> Bar:
        """Return a bar; see tqdm."""
        listed = list(items)
        return Bar(self, listed, len(listed) if total is None else total)


class Bar:
    """Counts requests, and tells the progress of every hundredth part of them."""

    def __init__(self, bars: Bars, items: list[Any], total: int):
        self._bars, self._items, self._total, self._done, self._steps = bars, items, total, 0, 0
        self._progress = None if bars.shown or not total else bars.progress
        if self._progress is not None:
            bars.shown = True
            self._progress.stage("tasks", min(total, STEPS))

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()
        self.close()

    def update(self, count: int = 1) -> None:
        """Count requests as done."""
        self._done += count
        while self._progress is not None and self._steps < min(self._total, STEPS) * self._done // self._total:
            self._steps += 1
            self._progress.step(f"{self._done:,} of {self._total:,} requests")

    def close(self) -> None:
        """End the bar's stage."""
        if self._progress is not None:
            self._progress.done()
            self._progress, self._bars.shown = None, False
