"""Stored parts as the native library reads them: repacked once into an image (native/image.h, native/kept.h)."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from math import ceil

import torch
from torch.nn import functional as F

from ...errors import KernelError
from ...formats import Parts
from ...formats.group_sparse import kept_groups
from ...spec import QuantSpec
from . import library

STRIP, ALIGNMENT = 16, 64  # as in native/image.h
LARGE_PAGE = 2 << 20  # bytes, on x86 and on ARM with pages of 4 KB
UNIT, LAST_PLACE, PLACES = 16, 65535, 8  # inputs side by side, and how far their places count: as in native/kept.h


def pack(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    """Pack the codes, scales and zeros of a weight, dense or group-sparse, as an image: uint8 (bytes,)."""
    return _pack_kept(parts, spec, shape) if spec.sparsity else _pack_dense(parts, spec, shape)


def image_shape(image: torch.Tensor) -> tuple[int, int]:
    """Return (N, K) of an image's weight; raises ValueError for anything this version does not pack."""
    n, k = ctypes.c_int64(), ctypes.c_int64()
    if image.dtype != torch.uint8 or not image.is_contiguous() or not image.is_cpu:
        raise ValueError(f"an image is contiguous uint8 on the CPU, and this is {image.dtype} on {image.device}.")
    try:
        library.loaded().image_shape(image.data_ptr(), image.numel(), ctypes.byref(n), ctypes.byref(k))
    except KernelError as error:
        raise ValueError(f"{image.numel()} bytes are no image of a weight that this version packs.") from error
    return n.value, k.value


def in_strips(b: torch.Tensor) -> torch.Tensor:
    """Return b (N, R) as the library reads it: (ceil(N / 16), R, 16), filled up with zeros."""
    padded = F.pad(b, (0, 0, 0, -b.shape[0] % STRIP))
    return padded.unflatten(0, (-1, STRIP)).transpose(1, 2).contiguous()


def readable(bias: torch.Tensor) -> torch.Tensor:
    """Return a bias as the library reads it."""
    return bias if bias.is_contiguous() and bias.dtype in library.TYPES else bias.contiguous().float()


def longest_row(group: int) -> int:
    """Return how many inputs a weight with dropped groups can have."""
    return LAST_PLACE // (PLACES * ceil(group / UNIT)) * group


def _pack_dense(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    lib = library.loaded()
    header = (spec.bits, *shape, spec.group_length(shape), int(spec.grouping == "per_ic"))
    image = _room(lib.image_bytes(*header, int(spec.symmetric)))
    stored = [_contiguous(parts, name) for name in ("qweight", "scales", "zeros")]
    lib.pack(*header, *map(_address, stored), image.data_ptr(), image.numel(), torch.get_num_threads())
    return image


def _pack_kept(parts: Parts, spec: QuantSpec, shape: tuple[int, int]) -> torch.Tensor:
    lib = library.loaded()
    kept_groups(parts, spec, shape)  # says what is wrong where there are more or fewer marks than groups
    stored = [_contiguous(parts, name) for name in ("kept", "qweight", "scales", "zeros")]
    header, size = (spec.bits, *shape, spec.group_length(shape), _address(stored[0])), ctypes.c_int64()
    lib.kept_bytes(*header, int(spec.symmetric), ctypes.byref(size))
    image = _room(size.value)
    parts_at, to = (*map(_address, stored[1:]), int(spec.symmetric)), (image.data_ptr(), image.numel())
    lib.pack_kept(*header, spec.kept_groups(shape), *parts_at, *to, torch.get_num_threads())
    return image


def _room(size: int) -> torch.Tensor:
    """Allocate bytes, in large pages where available: a row then takes 0.95 of the time for many weights (Zen 5)."""
    if size < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        room = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device="cpu")
        return room[-room.data_ptr() % ALIGNMENT :][:size]
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    with suppress(OSError):  # a system that was built without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // LARGE_PAGE * LARGE_PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


def _contiguous(parts: Parts, name: str) -> torch.Tensor | None:
    part = parts.get(name)
    return None if part is None else part.contiguous()


def _address(part: torch.Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()
