"""Own C++ kernels for weights in trellis codes on the CPU, as a torch operator and as a kernel for the registry.

The loops read codes as they are stored: 64 rows of one input are a few registers, whose integers are computed and not
looked up (native/trellis_lanes.h). One row of x meets them as they are decoded; for more rows a part of a tile is
decoded once, to floats in the first cache, or to bfloat16, in which the integers are exact. Sums are float32, times the
scale of the row at the end. Many rows of bfloat16 meet panels that are unpacked for torch's matmul, where the processor
is made for it.

A single row is rounded to int8, with a scale for every 32 activations, where QUANTC_CPU_INT8=1 says so: sums are of
whole numbers then. More rows share the decoding of a part and gain nothing by it, so that they stay as they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.compiler import is_compiling

from ...formats import Parts
from ...spec import QuantSpec, Trellis, tile_of
from ..base import DENSE_ONLY
from ..checks import expect_product, expect_same_device, expect_tensors
from ..gradients import differentiable, wants_gradient
from . import library
from .images import in_strips, readable
from .library import TYPES
from .panels import check_low_rank, multiply_back, multiply_panels, weight_addresses

# Rows of bfloat16 from which torch multiplies with unpacked panels, where the processor has products of bfloat16: own
# products take 0.6 times as long at 128 rows, 0.8 at 256 (Zen 4, one thread of a busy machine, 4096 inputs).
PANEL_FROM = 384

_pack_product = struct.Struct(library.PRODUCT).pack
_thread_count = torch.get_num_threads

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define(
    "trellis_matmul(Tensor x, Tensor codes, Tensor scales, Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, "
    "int bits, int hadamard, bool int8) -> Tensor"
)


class Stored(ctypes.Structure):
    """Stored of native/trellis.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("code_bytes", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("tile", ctypes.c_int32),
    )


@dataclass(slots=True)
class TrellisWeight:
    """A prepared weight (N, K): its parts, which are not copied.

    codes, scales: uint8 (ceil(N / tile), K, tile * bits / 8) and float16 (N, 1). low_rank_a, low_rank_b: float16 (R, K)
    and (ceil(N / 16), R, 16), or None. hadamard: order of the input's rotation, 0 for none. int8: whether a single row
    of activations is rounded. stored, addresses: where the library finds all that. multiply_rows: its product.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    low_rank_a: torch.Tensor | None
    low_rank_b: torch.Tensor | None
    bits: int
    hadamard: int
    int8: bool = False
    n: int = field(init=False)
    k: int = field(init=False)
    stored: Stored = field(init=False, repr=False)
    addresses: tuple[int, int, int, int, int] = field(init=False, repr=False)
    multiply_rows: Callable[..., None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.scales.ndim != 2:
            found = tuple(self.codes.shape), tuple(self.scales.shape)
            raise ValueError(f"a weight has codes (tiles, K, bytes) and scales (N, 1), and these are {found}.")
        self.n, self.k = self.scales.shape[0], self.codes.shape[1]
        self._check()
        parts = self.codes.data_ptr(), self.scales.data_ptr(), self.codes.numel()
        self.stored = Stored(*parts, self.n, self.k, self.bits, self.panel_step)
        self.addresses = weight_addresses(self, ctypes.addressof(self.stored))
        self.multiply_rows = library.loaded().multiply_trellis

    def _check(self) -> None:
        """Raise ValueError for parts that are not those of one weight."""
        tile = self.panel_step
        size = (-(-self.n // tile), self.k, tile * self.bits // 8)
        needed = {"codes": (size, torch.uint8), "scales": ((self.n, 1), torch.float16)}
        expect_tensors(needed, {"codes": self.codes, "scales": self.scales})
        check_low_rank(self.low_rank_a, self.low_rank_b, self.n, self.k)

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild copies from the parts: a copy has memory, and so addresses, of its own."""
        return TrellisWeight, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @property
    def panel_step(self) -> int:
        """See Unpacked in panels.py: a tile."""
        return tile_of(self.n)

    def panel(self, room: torch.Tensor, rows: int) -> torch.Tensor:
        """See Unpacked."""
        return room[: self.k * rows].view(self.k, rows)

    def unpack(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See Unpacked."""
        assert out.is_contiguous()
        room = out.data_ptr(), out.numel(), TYPES[out.dtype]
        library.loaded().unpack_trellis(ctypes.addressof(self.stored), start, stop, *room, torch.get_num_threads())


class NativeTrellis:
    """Own C++ kernels for trellis codes of every width and tile, on the instructions that the processor has.

    int8: whether weights prepared from now on round a single row of activations to int8.
    """

    name = "native-trellis"

    def __init__(self) -> None:
        self.int8 = library.int8_is_asked_for()

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on cpu, not on {device.type}"
        if not isinstance(spec.grid, Trellis):
            return f"multiplies trellis codes, not {spec.code} ones"
        found = library.load()
        if isinstance(found, str):
            return found
        if dtype not in TYPES:
            return f"runs in float32, float16 and bfloat16, not in {str(dtype)[6:]}"
        return DENSE_ONLY if spec.sparse else library.without_int8() if self.int8 else None

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> TrellisWeight:
        a, b = parts.get("low_rank_a"), parts.get("low_rank_b")
        return TrellisWeight(
            parts["qweight"].contiguous(),
            parts["scales"].contiguous(),
            None if a is None else a.contiguous(),
            None if b is None else in_strips(b),
            spec.bits,
            spec.hadamard,
            self.int8,
        )

    def run(self, x: torch.Tensor, prepared: TrellisWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        # As in native.py: through torch's dispatcher only where something looks on.
        if is_compiling() or type(x) is not torch.Tensor:
            w = prepared
            expect_product(x, w.n, w.k, bias, TYPES)
            y: torch.Tensor = torch.ops.quantc.trellis_matmul(
                x, w.codes, w.scales, w.low_rank_a, w.low_rank_b, bias, w.bits, w.hadamard, w.int8
            )
            return y
        if wants_gradient(x, bias):
            return differentiable(
                x, bias, lambda x, bias: self.run(x, prepared, bias), lambda y: multiply_back(y, prepared)
            )
        return multiply(x, prepared, bias)


NATIVE_TRELLIS = NativeTrellis()


@torch.library.impl(LIBRARY, "trellis_matmul", "CPU")
def _trellis_matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    low_rank_a: torch.Tensor | None,
    low_rank_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    hadamard: int,
    int8: bool,
) -> torch.Tensor:
    return multiply(x, TrellisWeight(codes, scales, low_rank_a, low_rank_b, bits, hadamard, int8), bias)


@torch.library.register_fake("quantc::trellis_matmul", lib=LIBRARY)
def _fake_trellis_matmul(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def multiply(x: torch.Tensor, w: TrellisWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K) in x's dtype; bias (N,) of any floating dtype.

    Raises RuntimeError for what nn.Linear does not multiply, and for a dtype that is not in TYPES.
    """
    n, k, dtype = w.n, w.k, x.dtype
    *leading, _ = expect_product(x, n, k, bias, TYPES)
    if not x.is_cpu:
        expect_same_device(x.device, w.codes.device)
    x = x.contiguous()
    rows = x.numel() // k
    y = x.new_empty((*leading, n))
    if rows >= PANEL_FROM and dtype == torch.bfloat16 and not library.loaded().trellis_takes_many_rows():
        multiply_panels(x.view(rows, k), w, bias, y.view(rows, n))
    elif rows:
        bias = bias if bias is None else readable(bias)
        of_bias = (0, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])
        product = _pack_product(*w.addresses, y.data_ptr(), *of_bias)
        w.multiply_rows(product, 1, x.data_ptr(), rows, k, TYPES[dtype], w.int8, _thread_count())
    return y
