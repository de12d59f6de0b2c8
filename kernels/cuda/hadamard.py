"""The online rotation of quantc/numerics/hadamard.py on a GPU: hadamard.cu's programs, tables and launches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ...numerics.hadamard import base_order, hadamard_matrix, rotation_signs
from .device import architecture, device_index, unavailable
from .launch import launch, refusal
from .program import Budget, Launch, Program

TYPES = {torch.float16: "Half", torch.bfloat16: "Bfloat", torch.float32: "float"}
THREADS = 128
LARGEST_REST = 1 << 14  # 64 KB of float32, the most that a block of Turing can ask for
SHARED_VALUES = 1 << 13  # of one block where more than one output is a choice: 32 KB, several blocks a multiprocessor
# Values and outputs of a thread: 64 sums in registers. Few widths have a shorter rest, and no model's is known: there a
# thread has one value.
MOST = 8
ALIGNMENT = 16  # bytes of one load


def supports(width: int, block: int, dtype: torch.dtype, arch: int) -> str | None:
    """Return None, or why rows of a width are not rotated in blocks of this order; arch: such as 80 for sm_80."""
    base = base_order(block)
    if base is None or width % block:
        return f"rotates in blocks of a Hadamard order that divides the width, and {block} of {width} is none"
    if dtype not in TYPES:
        return f"rotates float16, bfloat16 and float32, not {dtype}"
    if dtype == torch.bfloat16 and arch < 80:
        return "rounds to bfloat16 from compute capability 8.0 on"
    if block // base > LARGEST_REST:
        return f"keeps powers of two up to {LARGEST_REST} in shared memory, and {block} = {base} * {block // base}"
    return None


def programs() -> dict[Program, Budget]:
    """Return every variant that `hadamard_launch` can ask for."""
    shapes = [(MOST, 1), (MOST, 2), (MOST, 4), (MOST, MOST), (1, MOST)]
    return {
        _program(dtype, values, outputs): Budget(
            registers=128,
            shared_bytes=0,
            minimum_arch=80 if dtype == torch.bfloat16 else 75,
            everyday=dtype == torch.float16 and values == MOST and outputs in (1, MOST),
        )
        for dtype in TYPES
        for values, outputs in shapes
    }


@functools.cache
def refused(width: int, block: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return None once `rotate` can run on a device, else why not; compiles the kernel at the first call."""
    reason = unavailable(device)
    if reason is not None:
        return reason
    reason = supports(width, block, dtype, int(architecture(device_index(device)).removeprefix("sm_")))
    if reason is not None:
        return reason
    shape = _Shape.of(block)
    return refusal(_program(dtype, shape.values, shape.outputs), device, shape.shared)


def hadamard_launch(x: torch.Tensor, out: torch.Tensor, block: int) -> Launch:
    """Return the launch of out (M, K) = rotate(x (M, K), block).

    x and out are contiguous, 16-byte aligned, of one dtype, and do not overlap. The tables of a width are made at its
    first call: make that one before a graph is captured. Raises ValueError for tensors or a block that the kernel does
    not take.
    """
    _check(x, out, block)
    rows, width = x.shape
    shape = _Shape.of(block)
    spans = -(-rows * (width // shape.base) // shape.span)
    bits = shape.rest.bit_length() - 1
    return Launch(
        program=_program(x.dtype, shape.values, shape.outputs),
        grid=(spans * -(-shape.base // shape.outputs), 1, 1),
        block=(THREADS, 1, 1),
        shared=shape.shared,
        arguments=(x, out, *tables(width, block, x.device), rows, width, shape.base, bits, block**-0.5),
    )


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return rotate(x (..., K), block) of numerics/hadamard.py on a GPU; raises what `hadamard_launch` raises."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % ALIGNMENT:
        rows = rows.clone()
    out = torch.empty_like(rows)
    launch(hadamard_launch(rows, out, block))
    return out.view(x.shape)


@functools.cache
def tables(width: int, block: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 (1, ceil(width / 32)) of the signs and (base, ceil(base / 32)) of H_base: see `pack_signs`."""
    base = base_order(block)
    assert base is not None, block
    with torch.inference_mode(False):
        negative = pack_signs(rotation_signs(width, block)[None]), pack_signs(hadamard_matrix(base))
        return negative[0].to(device), negative[1].to(device)


def pack_signs(matrix: torch.Tensor) -> torch.Tensor:
    """Pack a matrix (R, C) of +-1 as int32 (R, ceil(C / 32)): bit c % 32 of word (r, c / 32) is set where it is -1."""
    negative = torch.nn.functional.pad((matrix < 0).long(), (0, -matrix.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (negative << torch.arange(32, device=matrix.device)).sum(2)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).to(torch.int32)


@dataclass(frozen=True)
class _Shape:
    """How a block of an order is spread. span: columns of a thread block; shared: its bytes."""

    base: int
    rest: int
    values: int
    outputs: int

    @classmethod
    def of(cls, block: int) -> _Shape:
        base = base_order(block) or 1
        rest = block // base
        alone = base == 1 and rest >= MOST
        outputs = 1 if alone else max(1, min(MOST, SHARED_VALUES // rest))
        return cls(base, rest, MOST if rest >= MOST else 1, outputs)

    @property
    def span(self) -> int:
        return max(self.rest, THREADS * self.values)

    @property
    def shared(self) -> int:
        return self.outputs * self.span * 4


def _program(dtype: torch.dtype, values: int, outputs: int) -> Program:
    defines = (("TYPE", TYPES[dtype]), ("VALUES", values), ("OUTPUTS", outputs))
    return Program("hadamard.cu", "hadamard", defines)


def _check(x: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """Raise ValueError for what the kernel would read or write wrongly."""
    alike = x.shape == out.shape and x.dtype == out.dtype
    if x.dim() != 2 or not alike or not x.is_contiguous() or not out.is_contiguous():
        found = f"x {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype}"
        raise ValueError(f"{found} are not contiguous (M, K) of one dtype")
    if x.data_ptr() % ALIGNMENT or out.data_ptr() % ALIGNMENT:
        raise ValueError(f"x and out begin at multiples of {ALIGNMENT} bytes")
    reason = supports(x.shape[1], block, x.dtype, arch=80)
    if reason is not None:
        raise ValueError(f"the kernel {reason}")
