"""Operators for compiled graphs: products of one tensor with several prepared weights, called without Python.

Python around an operator takes longer than the product of a small weight. torch's dispatcher calls C functions too,
through an interface of plain C that torch keeps stable (torch/csrc/stable), and so does the C++ that its compiler
writes. quantc::native_step1 to native_step4, and trellis_step1 to trellis_step4 for weights in trellis codes, are such
functions (native/steps.cpp).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from . import library

LARGEST_STEP = 4  # products
ROWS = 64  # of x: more take so long that Python does not matter
# In the order of Torch in native/steps.cpp.
FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_numel",
    "aoti_torch_get_dtype",
    "aoti_torch_is_contiguous",
    "aoti_torch_get_dim",
    "aoti_torch_get_size",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_get_num_threads",
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_bfloat16",
)
NAMES = [f"native_step{count}" for count in range(1, LARGEST_STEP + 1)]
TRELLIS_NAMES = [f"trellis_step{count}" for count in range(1, LARGEST_STEP + 1)]
TENSORS = {"native": ("image", "bias"), "trellis": ("codes", "scales", "bias")}  # of each weight
SETTINGS = {  # of all; in bits, four bits for each weight
    "native": "int biased, int hadamard, int int8, int n",
    "trellis": "int biased, int hadamard, int bits, int int8, int n",
}

LIBRARY = torch.library.Library("quantc", "FRAGMENT")


@functools.cache
def available() -> bool:
    """Return whether the operators are there: with the native library, and a torch that has the C interface."""
    native = library.load()
    torch_itself = _torch_library()
    if isinstance(native, str) or torch_itself is None:
        return False
    addresses = [ctypes.cast(getattr(torch_itself, name), ctypes.c_void_p) for name in FUNCTIONS]
    native.use_torch((ctypes.c_void_p * len(addresses))(*addresses))
    for kind, names in (("native", NAMES), ("trellis", TRELLIS_NAMES)):
        for count, name in enumerate(names, 1):
            tensors = ", ".join(["Tensor x", *(f"Tensor {part}{i}" for part in TENSORS[kind] for i in range(count))])
            LIBRARY.define(f"{name}({tensors}, {SETTINGS[kind]}) -> Tensor")
            torch.library.register_fake(f"quantc::{name}", _fake_step, lib=LIBRARY)
    _register(torch_itself, native)
    return True


def _fake_step(x: torch.Tensor, *rest: object) -> torch.Tensor:
    n = rest[-1]
    assert isinstance(n, int)
    return x.new_empty(x.numel() // x.shape[-1] * n)


def _torch_library() -> ctypes.CDLL | None:
    """Return torch's own library, which is loaded already, if it has all functions."""
    folder = Path(torch.__file__).parent / "lib"
    file = next((file for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (file := folder / name).exists()), None)
    try:
        found = None if file is None else ctypes.CDLL(str(file))
    except OSError:
        return None
    needed = (*FUNCTIONS, "aoti_torch_library_init_impl", "aoti_torch_library_impl")
    return found if all(hasattr(found, name) for name in needed) else None


def _register(torch_itself: ctypes.CDLL, native: library.Library) -> None:
    handle = ctypes.c_void_p()
    torch_itself.aoti_torch_library_init_impl(b"quantc", b"CPU", __file__.encode(), 0, ctypes.byref(handle))
    for names, function in ((NAMES, native.step), (TRELLIS_NAMES, native.trellis_step)):
        for name in names:
            torch_itself.aoti_torch_library_impl(handle, name.encode(), function)
