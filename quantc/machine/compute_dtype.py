"""The dtype that a model is computed in where the user names none.

It is the one that the model is stored in, except on a CPU that has no products of it. There torch's matmuls of bfloat16
or float16 take 2.4 times (AVX-512), 4 times (AVX2) or 9 to 30 times (neither) as long as those of float32, which holds
every value of both; a window of 512 tokens of SmolLM2-135M took 5.5 times as long. So such a model is computed in
float32, where memory holds it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..units import size
from .memory import available_bytes
from .timing import at_most_threads, best_in_turns

HALF = (torch.bfloat16, torch.float16)
# As slow as that beside float32 is no product of its own. Measured at every level of oneDNN: 0.55 to 0.65 with
# instructions for it, 2.3 and more without.
SLOWER = 1.25
PROBE = (64, 256, 512)  # M, N and K: 0.2 ms in float32
PROBE_ROUNDS = 5
ROOM = 0.8  # the share of free memory that weights may take: the rest is for activations and logits
# The limits that oneDNN can be given (ONEDNN_MAX_CPU_ISA) which leave it without products of bfloat16.
ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
WITHOUT_BFLOAT16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


@dataclass(frozen=True)
class Choice:
    """dtype: to compute in. why: it is not the stored one, or is in spite of its slowness; "" where that is plain.

    short: of memory, so that the slow dtype stays.
    """

    dtype: torch.dtype
    why: str = ""
    short: bool = False


def choose_dtype(stored: torch.dtype, device: torch.device, values: int) -> Choice:
    """Choose the dtype to compute a model in whose floats are stored in `stored`.

    values: how many floats would be held in that dtype, packed weights left out.
    """
    if device.type != "cpu" or stored not in HALF or multiplies(stored):
        return Choice(stored)
    needed, free = values * torch.float32.itemsize, available_bytes()
    if needed <= ROOM * free:
        return Choice(torch.float32, f"this processor has no {name_of(stored)} products")
    why = (
        f"this processor has no {name_of(stored)} products, but float32 needs {size(needed)} for the weights and "
        f"{size(free)} are free, so that it stays slow"
    )
    return Choice(stored, why, short=True)


def multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies matrices of a dtype about as fast as float32 ones in this torch."""
    return slowness(dtype) <= SLOWER


@functools.cache
def slowness(dtype: torch.dtype) -> float:
    """Return a matmul's time in a dtype over its time in float32, on one CPU thread; measured once, in 5 to 50 ms.

    Measured and not read from the processor's flags, as ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA may forbid what the
    processor has, and torch may make no use of it.
    """
    kinds = {"this": dtype, "float32": torch.float32}
    with torch.inference_mode(), at_most_threads(1):
        calls = {name: [_product(kind)] for name, kind in kinds.items()}
        best = best_in_turns(calls, 0.0, PROBE_ROUNDS)
    return best["this"] / best["float32"]


def _product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    m, n, k = PROBE
    x, weight = torch.full((m, k), 0.5, dtype=dtype), torch.full((n, k), 0.5, dtype=dtype)
    return lambda: F.linear(x, weight)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively, by what it says of itself.

    Calibration asks this and does not measure: what it computes decides the bytes of a checkpoint, which must be the
    same every time.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    limits = {os.environ.get(variable, "").upper() for variable in ONEDNN_VARIABLES}
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() and not limits & WITHOUT_BFLOAT16


def describe_dtypes() -> str:
    """Return a sentence for `quantc doctor`: what bfloat16 and float16 models are computed in on this CPU."""
    times = {name_of(dtype): slowness(dtype) for dtype in HALF}
    slow = [name for name, factor in times.items() if factor > SLOWER]
    measured = " and ".join(f"{factor:.1f} times as long in {name}" for name, factor in times.items())
    measured = f"measured: a matmul takes {measured} as in float32"
    if not slow:
        return f"Models are computed in the dtype they are stored in ({measured})."
    models, products = " and ".join(slow), " or ".join(slow)
    return f"{models} models are computed in float32 here: this processor has no {products} products ({measured})."


def name_of(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
