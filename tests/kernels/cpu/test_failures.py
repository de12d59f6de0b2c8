"""What the native library cannot do comes back as an exception: no memory, sizes that do not belong together."""

from __future__ import annotations

import ctypes
import struct

import pytest
import torch

from quantc.errors import KernelError
from quantc.kernels.cpu import images, library
from quantc.kernels.cpu.native import NATIVE, NativeWeight
from quantc.kernels.cpu.rotation import Rotation, Tables
from quantc.kernels.cpu.trellis import TrellisWeight
from quantc.numerics import hadamard
from quantc.spec import QuantSpec

from .cases import built, prepare, random_weight

pytestmark = built


@pytest.mark.parametrize("threads", [1, 2])
def test_no_room_to_work_in_is_a_memory_error(threads: int) -> None:
    """A row that no machine has room to rotate: the library asks for the room before it reads the row."""
    real = Rotation(64, 64)
    tables = Tables(2**50, 2**50, 1, real._tables.signs, real._tables.quarters, 1.0)
    x, out = torch.ones(1, 64), torch.ones(1, 64)
    for _ in range(2):  # what failed once does not leave a size behind that is not there
        with pytest.raises(MemoryError, match="out of memory: the native CPU kernel found no room to work in"):
            library.loaded().rotate(ctypes.addressof(tables), x.data_ptr(), out.data_ptr(), 2, 0, threads)
    library.loaded().rotate(real.address, x.data_ptr(), out.data_ptr(), 1, 0, threads)
    torch.testing.assert_close(out, hadamard.rotate(x, 64))


def test_sizes_past_64_bits_are_no_image() -> None:
    size = library.loaded().image_bytes
    for n, k, group, per_ic in [
        (2**31, 2**31, 1, 0),
        (2**31, 2**31, 1, 1),
        (2**62, 2**62, 64, 0),
        (2**63 - 1, 1, 64, 0),
        (1, 2**63 - 1, 64, 1),
        (0, 64, 64, 0),
        (64, -1, 64, 0),
        (64, 64, 0, 0),
    ]:
        assert size(4, n, k, group, per_ic, 0) == 0
    assert size(4, 2**20, 2**20, 64, 0, 0) > 2**38


def test_the_library_takes_no_sizes_that_do_not_belong_together() -> None:
    weight = prepare(random_weight(QuantSpec(4, 32), (40, 96)), torch.float32)
    lib, image = library.loaded(), weight.image.data_ptr()
    x = torch.ones(1, 96)
    for product, count, rows, k, kind in [
        (b"\0" * 64, 0, 1, 96, 0),
        (b"\0" * 64, 9, 1, 96, 0),
        (weight_product(weight), 1, -1, 96, 0),
        (weight_product(weight), 1, 1, 192, 0),
        (weight_product(weight), 1, 1, 96, 3),
    ]:
        with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_matmul"):
            lib.matmul(product, count, x.data_ptr(), rows, k, kind, 0, 1)
    out = torch.empty(96, 16)
    for start, stop, values in [(-16, 0, 1536), (0, 8, 768), (0, 64, 6144), (16, 16, 0), (0, 16, 1535)]:
        with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_unpack"):
            lib.unpack(image, start, stop, out.data_ptr(), values, 0, 1)
    with pytest.raises(KernelError, match="quantc_cpu_pack;"):
        lib.pack(4, 40, 96, 32, 0, None, None, None, image, weight.image.numel() - 64, 1)
    weight.unpack(0, 16, out)


WRONG_SIZES = {"bits": (0, 6), "tile": (8, 128), "n": (0, 129, 2**62), "k": (95,), "code_bytes": (0,)}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG_SIZES for value in WRONG_SIZES[field]])
def test_the_library_takes_no_trellis_whose_sizes_do_not_belong_together(field: str, value: int) -> None:
    lib, x = library.loaded(), torch.ones(1, 96)
    weight = trellis_weight(128, 96)
    setattr(weight.stored, field, value)
    with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_multiply_trellis"):
        lib.multiply_trellis(trellis_product(weight), 1, x.data_ptr(), 1, 96, 0, 0, 1)
    with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_unpack_trellis"):
        lib.unpack_trellis(ctypes.addressof(weight.stored), 0, 64, x.data_ptr(), 64 * 96, 0, 1)


def test_the_library_takes_no_rows_and_panels_that_a_trellis_does_not_have() -> None:
    lib, weight, x = library.loaded(), trellis_weight(130, 96), torch.ones(1, 96)
    wrong = [
        (1, -1, 96, 0, 1),
        (1, 1, 95, 0, 1),
        (1, 1, 96, 3, 1),
        (1, 1, 96, 0, 0),
        (0, 1, 96, 0, 1),
        (9, 1, 96, 0, 1),
    ]
    for count, rows, k, kind, threads in wrong:
        with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_multiply_trellis"):
            lib.multiply_trellis(trellis_product(weight), count, x.data_ptr(), rows, k, kind, 0, threads)
    out = torch.empty(96, 64)
    for start, stop, values in [(-64, 0, 6144), (0, 16, 1536), (0, 192, 18432), (64, 64, 0), (0, 64, 6143)]:
        with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_unpack_trellis"):
            lib.unpack_trellis(ctypes.addressof(weight.stored), start, stop, out.data_ptr(), values, 0, 1)
    weight.unpack(0, 64, out)


def test_parts_that_are_not_those_of_one_trellis_weight_are_refused() -> None:
    codes, scales = torch.zeros(2, 96, 24, dtype=torch.uint8), torch.ones(128, 1).half()
    for wrong in [(codes[:1], scales), (codes, scales[:64]), (codes[:, :, :23], scales), (codes, scales.float())]:
        with pytest.raises(ValueError, match="must be contiguous"):
            TrellisWeight(*wrong, None, None, 3, 0)
    for wrong in [(codes[0], scales), (codes, scales[:, 0])]:
        with pytest.raises(ValueError, match=r"codes \(tiles, K, bytes\) and scales \(N, 1\)"):
            TrellisWeight(*wrong, None, None, 3, 0)
    with pytest.raises(ValueError, match="a low-rank factor must be contiguous"):
        TrellisWeight(codes, scales, torch.ones(2, 96).half(), torch.ones(2, 2, 16).half(), 3, 0)


def trellis_weight(n: int, k: int) -> TrellisWeight:
    codes = torch.zeros(-(-n // 64), k, 24, dtype=torch.uint8)
    return TrellisWeight(codes, torch.ones(n, 1).half(), None, None, 3, 0)


def trellis_product(weight: TrellisWeight) -> bytes:
    return struct.pack(library.PRODUCT, *weight.addresses, 0, 0, 0)


def weight_product(weight: NativeWeight) -> bytes:
    return struct.pack(library.PRODUCT, *weight.addresses, 0, 0, 0)


def test_more_marks_than_stored_groups_are_refused_by_the_library_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = QuantSpec(4, 16, sparsity=0.5)
    parts = {
        "kept": torch.full((32, 1), 0b1111, dtype=torch.uint8),  # 4 of 4 groups, and 2 are stored
        "qweight": torch.zeros(64, 8, dtype=torch.uint8),
        "scales": torch.ones(64).half(),
        "zeros": torch.zeros(32, dtype=torch.uint8),
    }
    monkeypatch.setattr(images, "kept_groups", lambda *_: None)
    with pytest.raises(KernelError, match="takes no such sizes or types in quantc_cpu_pack_kept"):
        NATIVE.prepare(parts, spec, (32, 64), torch.float32)
