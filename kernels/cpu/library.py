"""The C++ library behind the native kernels: found, loaded, and set to an instruction set.

setup.py builds it where there is a compiler; everything else works without. Environment: QUANTC_CPU_LEVEL forces an
instruction set, for tests and measurements (a name that `levels()` gives); QUANTC_CPU_INT8=1 lets kernels round
activations to int8.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelError, UsageError

VERSION = 11  # of the C interface in native/api.h and of images
LEVEL_VARIABLE = "QUANTC_CPU_LEVEL"
INT8_VARIABLE = "QUANTC_CPU_INT8"
FOLDER = Path(__file__).parent
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as native/level.h numbers them

PRODUCT = "PPPPqPPq"  # Product of native/weight.h, for struct.pack

OUT_OF_MEMORY, REFUSED = 1, 2  # Status of native/api.h; 0 is success

_INT, _LONG, _POINTER, _TEXT = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
_BYTES = ctypes.c_char_p
_LONG_OUT = ctypes.POINTER(ctypes.c_int64)
_INTERFACE: dict[str, tuple[Any, list[Any]]] = {
    "version": (_INT, []),
    "levels": (_TEXT, []),
    "level": (_TEXT, []),
    "choose_level": (_INT, [_TEXT]),
    "has_int8": (_INT, []),
    "pool": (_TEXT, []),
    "image_bytes": (_LONG, [_INT, _LONG, _LONG, _LONG, _INT, _INT]),
    "trellis_takes_many_rows": (_INT, []),
    "panel_by_rows": (_INT, [_POINTER]),
    "takes_many_rows": (_INT, [_POINTER]),
    "panel_step": (_LONG, [_POINTER]),
    "use_torch": (None, [_POINTER]),
    "step": (None, [_POINTER, _LONG, _LONG]),
    "trellis_step": (None, [_POINTER, _LONG, _LONG]),
}
_CAN_FAIL: dict[str, list[Any]] = {
    "pack": [_INT, _LONG, _LONG, _LONG, _INT, *[_POINTER] * 4, _LONG, _INT],
    "kept_bytes": [_INT, _LONG, _LONG, _LONG, _POINTER, _INT, _LONG_OUT],
    "pack_kept": [_INT, _LONG, _LONG, _LONG, _POINTER, _LONG, *[_POINTER] * 3, _INT, _POINTER, _LONG, _INT],
    "round_trellis": [_INT, _INT, _LONG, _LONG, *[_POINTER] * 4, _LONG, _LONG, _POINTER, _POINTER, _INT],
    "image_shape": [_POINTER, _LONG, _LONG_OUT, _LONG_OUT],
    "matmul": [_BYTES, _INT, _POINTER, _LONG, _LONG, _INT, _INT, _INT],
    "rotate": [_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT],
    "keep_rotation": [_POINTER],
    "multiply_trellis": [_BYTES, _INT, _POINTER, _LONG, _LONG, _INT, _INT, _INT],
    "unpack_trellis": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _INT],
    "unpack": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _INT],
}


def _expect_success(status: int, function: Any, _: Any) -> None:
    """Raise MemoryError or KernelError for the status that a function of the library returns."""
    if status == OUT_OF_MEMORY:
        raise MemoryError("out of memory: the native CPU kernel found no room to work in.")
    if status:
        why = "takes no such sizes or types" if status == REFUSED else "was refused something by the system"
        raise KernelError(f"the native CPU kernel {why} in {function.__name__}; report this as a bug of quantc.")


class Library:
    """The functions of native/api.h, under their names without the prefix.

    Those that can fail raise MemoryError, or KernelError for what the C++ refuses, and return nothing.
    """

    version: Any
    levels: Any
    level: Any
    choose_level: Any
    has_int8: Any
    pool: Any
    image_bytes: Any
    pack: Any
    kept_bytes: Any
    pack_kept: Any
    round_trellis: Any
    image_shape: Any
    matmul: Any
    rotate: Any
    panel_by_rows: Any
    takes_many_rows: Any
    panel_step: Any
    use_torch: Any
    keep_rotation: Any
    step: Any
    trellis_step: Any
    multiply_trellis: Any
    unpack_trellis: Any
    trellis_takes_many_rows: Any
    unpack: Any

    def __init__(self, file: Path):
        loaded = ctypes.CDLL(str(file))
        for name, (result, arguments) in _INTERFACE.items():
            function = getattr(loaded, f"quantc_cpu_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        for name, arguments in _CAN_FAIL.items():
            function = getattr(loaded, f"quantc_cpu_{name}")
            function.restype, function.argtypes, function.errcheck = ctypes.c_int32, arguments, _expect_success
            setattr(self, name, function)


@functools.cache
def load() -> Library | str:
    """Return the library, or why there is none as the end of a sentence that starts with a kernel's name.

    Raises UsageError for a level in the environment that this processor or this build does not have.
    """
    files = [FOLDER / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return "was not built, for which pip needs a C++ compiler (GCC or Clang) when it installs quantc"
    try:
        library = Library(file)
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {str(error).strip().splitlines()[0]}"
    if library.version() != VERSION:
        return f"was built from other sources ({file}); install quantc again"
    wanted = os.environ.get(LEVEL_VARIABLE)
    if wanted:
        _choose(library, wanted)
    return library


def loaded() -> Library:
    """Return the library where it is known to be there."""
    library = load()
    assert isinstance(library, Library), library
    return library


def int8_is_asked_for() -> bool:
    """Return whether the environment says that activations are rounded to int8."""
    return os.environ.get(INT8_VARIABLE, "0") not in ("", "0")


def without_int8() -> str | None:
    """Return that the instruction set in use has no products of int8 activations, as the end of a sentence."""
    return None if loaded().has_int8() else f"has no int8 activations on {level()}, and {INT8_VARIABLE} asks for them"


def levels() -> list[str]:
    """Return the instruction sets that this processor and this build have, the best last."""
    names: str = loaded().levels().decode()
    return names.split()


def level() -> str:
    """Return the instruction set in use."""
    name: str = loaded().level().decode()
    return name


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use a level in place of the best, in the whole process."""
    before = level()
    _choose(loaded(), name)
    try:
        yield
    finally:
        _choose(loaded(), before)


def describe() -> str:
    """Return one sentence for `quantc doctor`."""
    library = load()
    if isinstance(library, str):
        return f"Not ready: the native CPU kernel {library}."
    threads = "shares torch's OpenMP threads" if library.pool() == b"openmp" else "has threads of its own"
    return f"Ready: uses {level()} of {', '.join(levels())}; {threads}."


def _choose(library: Library, name: str) -> None:
    if not library.choose_level(name.encode()):
        known = library.levels().decode().replace(" ", ", ")
        raise UsageError(f"this CPU does not support {LEVEL_VARIABLE}={name}; choose one of {known}.")
