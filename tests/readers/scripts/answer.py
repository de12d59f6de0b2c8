"""What every reader's script does: answer with logits, a file for each folder that it was asked about."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np


def answer(logits: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Run as `script.py PLACE FOLDER...`: of PLACE/tokens.npy (T,) write PLACE/0.npy (T, V), or 0.txt with why not."""
    place, folders = Path(sys.argv[1]), sys.argv[2:]
    tokens = np.load(place / "tokens.npy")
    for number, folder in enumerate(folders):
        try:
            np.save(place / f"{number}.npy", np.asarray(logits(folder, tokens), dtype=np.float32))
        except Exception:
            (place / f"{number}.txt").write_text(traceback.format_exc(), encoding="utf-8")
