"""Starts programs on torch's current stream, and loads them before that.

The driver is called through CuPy's thin wrapper, at a few microseconds a launch; nothing waits for the GPU and nothing
is allocated on it, so that launches can be captured into a CUDA graph once their programs are loaded.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import KernelError
from . import build
from .device import architecture, device_index, first_line, record_failure, shared_limit, unavailable
from .program import Argument, Launch, Program

SHARED_BY_DEFAULT = 48 * 1024  # bytes of dynamic shared memory that need no permission
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

Value = ctypes.c_void_p | ctypes.c_int | ctypes.c_float


@dataclass
class Loaded:
    """A program on one device: the driver's handle, and the dynamic shared memory it is allowed."""

    function: int
    shared: int = SHARED_BY_DEFAULT


_loaded: dict[tuple[Program, int], Loaded] = {}
_lock = threading.Lock()


def refusal(program: Program, device: torch.device, shared: int = 0) -> str | None:
    """Return None once a program is loaded on a device with the dynamic shared memory it needs; else why not.

    The reason is the end of a sentence that starts with the kernel's name. The first call for a program compiles it, so
    a kernel asks this last of all in `supports`. What fails then makes the device unavailable, with one warning.
    """
    reason = unavailable(device)
    if reason is not None:
        return reason
    limit = shared_limit(device_index(device))
    if shared > limit:
        return f"needs {shared} bytes of shared memory a block, and this GPU has {limit}"
    try:
        warm(program, device, shared)
    except (KernelError, OSError) as error:  # OSError: a source file is missing
        return record_failure(device, error)
    return None


def warm(program: Program, device: torch.device, shared: int = 0) -> None:
    """Compile and load a program, so that its launches can be captured; shared: bytes of dynamic shared memory.

    Raises KernelError if it cannot be compiled or the driver refuses it.
    """
    index = device_index(device)
    with _on(index):
        _load(program, index, shared)


def launch(item: Launch) -> None:
    """Start a program on the current stream of its tensors' device; an empty grid starts nothing.

    Raises ValueError for arguments a kernel cannot take, KernelError for what `warm` raises it and where the driver
    refuses the launch.
    """
    if 0 in item.grid:
        return
    index = _common_device(item.arguments)
    values = [_value(argument) for argument in item.arguments]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    with _on(index):
        program = _load(item.program, index, item.shared)
        stream = torch.cuda.current_stream(index).cuda_stream
        where = ctypes.addressof(pointers)
        try:
            _driver().launchKernel(program.function, *item.grid, *item.block, item.shared, stream, where, 0)
        except RuntimeError as error:
            raise KernelError(_complaint("start", item.program, index, error)) from error


def _value(argument: Argument) -> Value:
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if not -(2**31) <= argument < 2**31:
        raise ValueError(f"the argument {argument} is no 32-bit int, and kernels take no other.")
    return ctypes.c_int(argument)


def _common_device(arguments: tuple[Argument, ...]) -> int:
    places = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
    if len(places) != 1 or next(iter(places)).type != "cuda":
        found = ", ".join(sorted(map(str, places))) or "none"
        raise ValueError(f"the tensors are on {found}; a launch needs all of them on one CUDA device.")
    return device_index(places.pop())


def _on(index: int) -> AbstractContextManager[Any]:
    """Make the device current, where it is not."""
    return nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index)


def _load(program: Program, index: int, shared: int) -> Loaded:
    """Return the program's function on the current device, which is `index`."""
    if _driver().ctxGetCurrent() == 0:  # a thread that has not used the GPU yet
        _runtime().setDevice(index)
    found = _loaded.get((program, index))
    if found is None or found.shared < shared:
        with _lock:
            found = _loaded.get((program, index)) or _load_function(program, index)
            _allow_shared(found, program, index, shared)
            _loaded[program, index] = found
    return found


def _load_function(program: Program, index: int) -> Loaded:
    compiled = build.compile_program(program, architecture(index))
    try:
        module = _driver().moduleLoadData(compiled.cubin)
        return Loaded(_driver().moduleGetFunction(module, program.entry))
    except RuntimeError as error:
        raise KernelError(_complaint("load", program, index, error)) from error


def _allow_shared(loaded: Loaded, program: Program, index: int, shared: int) -> None:
    if shared <= loaded.shared:
        return
    try:
        _driver().funcSetAttribute(loaded.function, MAX_DYNAMIC_SHARED, shared)
    except RuntimeError as error:
        raise KernelError(_complaint(f"give {shared} bytes of shared memory to", program, index, error)) from error
    loaded.shared = shared


def _complaint(verb: str, program: Program, index: int, error: Exception) -> str:
    return (
        f"the driver cannot {verb} {program.entry} of {program.source} on cuda:{index} ({first_line(error)}); "
        "update the driver, or run on the CPU."
    )


@functools.cache
def _driver() -> Any:
    from cupy_backends.cuda.api import driver

    return driver


@functools.cache
def _runtime() -> Any:
    from cupy.cuda import runtime

    return runtime
