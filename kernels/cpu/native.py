"""Own C++ kernels for packed weights on the CPU, as a torch operator and as a kernel for the registry.

Weights are repacked once into an image (native/image.h): 16 output channels side by side, inputs running inside, codes
placed so that a shift or a mask yields them for float32, bfloat16 and int8 products alike. Few rows of x are multiplied
with the codes; many with weights made once for all of them, rounded to bfloat16 or, where the processor has no products
of those, in floats. Of weights with dropped groups (native/kept.h) only the groups that stay are in the image, and are
read; there many rows of bfloat16 meet panels that are unpacked for torch's matmul, where the processor is made for it.

Activations are rounded to int8 only where QUANTC_CPU_INT8=1 says so, or NATIVE.int8 is set: then sums are of
products of integers, with a scale for every 32 activations, but not where groups are dropped. Nothing else changes the
arithmetic.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.compiler import is_compiling

from ...formats import Parts
from ...spec import QuantSpec
from ..base import DENSE_ONLY, other_grid
from ..checks import expect_product, expect_same_device
from ..gradients import differentiable, wants_gradient
from . import library
from .images import image_shape, in_strips, longest_row, pack, readable
from .library import TYPES
from .panels import check_low_rank, multiply_back, multiply_panels, weight_addresses

LEAST_GROUP = {"per_oc": 8, "per_ic": 4}  # a group fills whole blocks or strips: shorter ones would be padding mostly
# Rows of x from which torch multiplies with unpacked panels of a weight with dropped groups, where the processor has
# products of bfloat16. With half of the groups of 16 dropped, own bfloat16 products take 0.5 times as long as panels
# at 32 rows, 0.8 and 1.5 times at 64 (K 1536 and 4096), 1.3 and 1.9 times at 128; float32 ones half up to 256 rows.
PANEL_FROM = {torch.bfloat16: 64}

# Looked up once: a product of one row takes 16 us in its smallest shape here, and every name on the way 0.05.
_pack_product = struct.Struct(library.PRODUCT).pack
_thread_count = torch.get_num_threads

LIBRARY = torch.library.Library("quantc", "FRAGMENT")
LIBRARY.define(
    "native_matmul(Tensor x, Tensor image, Tensor? low_rank_a, Tensor? low_rank_b, Tensor? bias, int n, "
    "int hadamard, bool int8) -> Tensor"
)


@dataclass(slots=True)
class NativeWeight:
    """A prepared weight (N, K).

    image: uint8 (bytes,), see native/image.h. low_rank_a, low_rank_b: float16 (R, K) and (ceil(N / 16), R, 16), or
    None. hadamard: order of the input's rotation, 0 for none. int8: whether activations are rounded. addresses: of all
    that, as Weight of native/weight.h lists them. multiply_rows: the library's matmul, so that no product looks it up.
    """

    image: torch.Tensor
    n: int
    k: int
    low_rank_a: torch.Tensor | None
    low_rank_b: torch.Tensor | None
    hadamard: int
    int8: bool
    addresses: tuple[int, int, int, int, int] = field(init=False, repr=False)
    multiply_rows: Callable[..., None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if image_shape(self.image) != (self.n, self.k):
            raise ValueError(f"an image of {image_shape(self.image)} is no weight of {(self.n, self.k)}.")
        check_low_rank(self.low_rank_a, self.low_rank_b, self.n, self.k)
        self.addresses = weight_addresses(self, self.image.data_ptr())
        self.multiply_rows = library.loaded().matmul

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild copies from the parts: a copy has memory, and so addresses, of its own."""
        return NativeWeight, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @property
    def by_rows(self) -> bool:
        """Whether panels are unpacked by outputs, as where groups are dropped, and not by inputs."""
        return bool(library.loaded().panel_by_rows(self.image.data_ptr()))

    @property
    def panel_step(self) -> int:
        """See Unpacked in panels.py."""
        step: int = library.loaded().panel_step(self.image.data_ptr())
        return step

    def panel(self, room: torch.Tensor, rows: int) -> torch.Tensor:
        """See Unpacked."""
        values = room[: self.k * rows]
        return values.view(rows, self.k).T if self.by_rows else values.view(self.k, rows)

    def unpack(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See Unpacked."""
        assert (out.T if self.by_rows else out).is_contiguous()
        room = out.data_ptr(), out.numel(), TYPES[out.dtype]
        library.loaded().unpack(self.image.data_ptr(), start, stop, *room, torch.get_num_threads())


class NativeCpu:
    """Own C++ kernels for every code width, on the instructions that the processor has.

    int8: whether weights prepared from now on round their activations to int8 (see the module's docstring).
    """

    name = "native"

    def __init__(self) -> None:
        self.int8 = library.int8_is_asked_for()

    def supports(self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"runs on cpu, not on {device.type}"
        found = library.load()
        if isinstance(found, str):
            return found
        if dtype not in TYPES:
            return f"runs in float32, float16 and bfloat16, not in {str(dtype)[6:]}"
        if spec.two_of_four:
            return DENSE_ONLY
        if (reason := other_grid(spec)) is not None:
            return reason
        along = shape[1] if spec.grouping == "per_oc" else shape[0]
        least, group = LEAST_GROUP[spec.grouping], spec.group_length(shape)
        if group < min(least, along):
            return f"needs {spec.grouping} groups of {least} or more, not {group}"
        if spec.sparsity and shape[1] > (longest := longest_row(group)):
            return f"needs rows of up to {longest} inputs in groups of {group} where groups are dropped, not {shape[1]}"
        return library.without_int8() if self.int8 and not spec.sparsity else None

    def prepare(self, parts: Parts, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype) -> NativeWeight:
        image = pack(parts, spec, shape)
        a, b = parts.get("low_rank_a"), parts.get("low_rank_b")
        return NativeWeight(
            image,
            *shape,
            None if a is None else a.contiguous(),
            None if b is None else in_strips(b),
            spec.hadamard,
            self.int8 and not spec.sparsity,
        )

    def run(self, x: torch.Tensor, prepared: NativeWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        # A call through torch's dispatcher costs as much as the product of a small weight, and is needed only where
        # something looks on: a compiler, or a tensor that is not quite one.
        if is_compiling() or type(x) is not torch.Tensor:
            w = prepared
            expect_product(x, w.n, w.k, bias, TYPES)
            y: torch.Tensor = torch.ops.quantc.native_matmul(
                x, w.image, w.low_rank_a, w.low_rank_b, bias, w.n, w.hadamard, w.int8
            )
            return y
        if wants_gradient(x, bias):
            return differentiable(
                x, bias, lambda x, bias: self.run(x, prepared, bias), lambda y: multiply_back(y, prepared)
            )
        return multiply(x, prepared, bias)


NATIVE = NativeCpu()


@torch.library.impl(LIBRARY, "native_matmul", "CPU")
def _native_matmul(
    x: torch.Tensor,
    image: torch.Tensor,
    low_rank_a: torch.Tensor | None,
    low_rank_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    hadamard: int,
    int8: bool,
) -> torch.Tensor:
    weight = NativeWeight(image, n, image_shape(image)[1], low_rank_a, low_rank_b, hadamard, int8)
    return multiply(x, weight, bias)


@torch.library.register_fake("quantc::native_matmul", lib=LIBRARY)
def _fake_native_matmul(x: torch.Tensor, *weight_and_bias: object) -> torch.Tensor:
    n = weight_and_bias[4]
    assert isinstance(n, int)
    return x.new_empty(*x.shape[:-1], n)


def multiply(x: torch.Tensor, w: NativeWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return y (..., N) for x (..., K) in x's dtype; bias (N,) of any floating dtype.

    Raises RuntimeError for what nn.Linear does not multiply, and for a dtype that is not in TYPES.
    """
    n, k, dtype = w.n, w.k, x.dtype
    *leading, _ = expect_product(x, n, k, bias, TYPES)
    if not x.is_cpu:
        expect_same_device(x.device, w.image.device)
    if not x.is_contiguous():
        x = x.contiguous()
    rows = x.numel() // k
    y = x.new_empty((*leading, n))
    if rows > 1 and _is_for_panels(w, rows, dtype):
        multiply_panels(x.view(rows, k), w, bias, y.view(rows, n))
    elif rows:
        bias = bias if bias is None else readable(bias)
        of_bias = (0, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])
        product = _pack_product(*w.addresses, y.data_ptr(), *of_bias)
        w.multiply_rows(product, 1, x.data_ptr(), rows, k, TYPES[dtype], w.int8, _thread_count())
    return y


def _is_for_panels(w: NativeWeight, rows: int, dtype: torch.dtype) -> bool:
    if w.int8 or rows < PANEL_FROM.get(dtype, rows + 1):
        return False
    return not library.loaded().takes_many_rows(w.image.data_ptr())
