"""What the tiny model's built-in outlier channels cost once it is quantized, and how much of that a recipe recovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import quantc
from quantc.evaluation.scores import score
from quantc.evaluation.windows import make_windows
from quantc.frontend import open_model
from quantc.progress import LogProgress
from quantc.recipe import Recipe
from tests.tiny_model.outliers import remove_outliers
from tests.tiny_model.stories import write_stories

TINY = Path(__file__).parent / "tiny_model"
MODEL = TINY / "model"
CALIBRATION_SEED = 12345  # stories that are neither the model's training text nor the held-out ones
STORIES = 20  # held-out ones that are scored


class OutlierLab:
    """Quantizes the model as stored and without its outliers, which compute the same, and scores both.

    folder: for what is written on the way.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        source = open_model(MODEL)
        self.original = source.load_whole(torch.float32)
        plain, self.outliers = remove_outliers(self.original)
        plain.save_pretrained(folder / "plain")
        source.tokenizer.save_pretrained(folder / "plain")
        (folder / "stories.txt").write_text("\n".join(write_stories(40, CALIBRATION_SEED)))
        heldout = [story.strip() for story in (TINY / "heldout.txt").read_text().split("<|endoftext|>")]
        self.windows = make_windows(source.tokenizer, [story for story in heldout if story][:STORIES], context=256)
        self._known: dict[str, float] = {}

    def kl(self, *passes: Any, outliers: bool = True, **quantize: Any) -> float:
        """KL divergence of a model quantized by a recipe: `passes` in order, as recipes write them, then quantize."""
        content = {"version": 1, "passes": [*passes, {"quantize": quantize}]}
        key = f"{outliers} {content}"
        if key not in self._known:
            out = self.folder / f"out-{len(self._known)}"
            quantc.quantize(
                MODEL if outliers else self.folder / "plain", recipe=Recipe.from_dict(content), out=out,
                calib=str(self.folder / "stories.txt"), samples=32, seq_len=128,
            )  # fmt: skip
            found = score(quantc.load(out, dtype=torch.float32), self.original, self.windows, LogProgress()).mean_kl
            assert found is not None
            self._known[key] = found
        return self._known[key]

    def recovery(self, baseline: list[Any], passes: list[Any], **quantize: Any) -> float:
        """Share of what the outliers cost under `baseline` that `passes` take back.

        The cost is the KL divergence with outliers less that without; 1 means as good as a model that has none.
        """
        cost = self.kl(*baseline, **quantize) - self.kl(*baseline, outliers=False, **quantize)
        left = self.kl(*passes, **quantize) - self.kl(*baseline, outliers=False, **quantize)
        return 1 - left / cost
