"""What a run leaves behind in its process: nothing that the next run adds to."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest

import quantc
from tests.families import build
from tests.helpers import save_with_tokenizer

WARM, MORE = 3, 6  # runs before the first look, and between the two


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = (
        *((f"before_{i}", ctypes.c_size_t) for i in range(4)),
        ("hblkhd", ctypes.c_size_t),  # in blocks of their own
        *((f"between_{i}", ctypes.c_size_t) for i in range(2)),
        ("uordblks", ctypes.c_size_t),  # in arenas
        *((f"after_{i}", ctypes.c_size_t) for i in range(2)),
    )


def in_use() -> int:
    """Bytes that malloc has handed out: what is free inside the process, which resident memory counts, is not in it."""
    ask: Any = ctypes.CDLL(None).mallinfo2
    ask.restype = Mallinfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc what is in use")
@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger keeps frames")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_runs_leave_no_objects_and_no_memory_behind(method: str, tmp_path: Path) -> None:
    model = build("llama")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    save_with_tokenizer(model, tmp_path / "m")
    settings: Any = {} if method == "rtn" else {"samples": 4, "seq_len": 32}

    def run(count: int) -> tuple[int, int]:
        for _ in range(count):
            quantc.quantize(
                tmp_path / "m", bits=4, group_size=16, method=method, out=tmp_path / "o", force=True, **settings
            )
            packed = quantc.load(tmp_path / "o")
            packed(model.dummy_inputs["input_ids"] % 64)
            del packed
        return objects(), in_use()

    objects_before, bytes_before = run(WARM)
    objects_after, bytes_after = run(MORE)
    # A leak of one object a run, or of a tenth of the weights, shows.
    assert objects_after - objects_before < MORE
    assert bytes_after - bytes_before < MORE * weights / 10
