"""`quantc doctor`: what this machine offers, which kernel runs each linear of a checkpoint, how fast."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from ..checkpoint.reader import CheckpointReader
from ..files import disk_cache
from ..machine.compute_dtype import describe_dtypes, name_of
from ..machine.devices import parse_device
from ..units import plural, size
from ..version import __version__

CPU_INFO = Path("/proc/cpuinfo")
# Instruction sets that a kernel may ask for, as /proc/cpuinfo spells them on x86 and on ARM.
FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def examine(
    folder: Path | None, device: str = "cpu", dtype: str | None = None, measure: bool = False
) -> dict[str, Any]:
    """Return all that `quantc doctor` tells; with a folder the kernels of its checkpoint, their speed on request."""
    facts: dict[str, Any] = {"machine": examine_machine()}
    if folder is not None:
        facts.update(examine_kernels(folder, device, dtype))
    if measure:
        from .kernel_speed import measure_kernels

        facts["measured"] = measure_kernels()
    return facts


def examine_machine() -> dict[str, str]:
    """Return libraries, processor, memory and accelerators, a phrase or sentence each."""
    name, features = read_cpu()
    memory = psutil.virtual_memory()
    return {
        "quantc": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": installed_version("transformers") or "not installed",
        "system": platform.platform(terse=True),
        "cpu": name,
        "cpu features": " ".join(features) or "unknown",
        "threads": f"{torch.get_num_threads()} used by torch, of {plural(usable_cores(), 'core')}",
        "memory": f"{size(memory.total)}, of which {size(memory.available)} free",
        "cpu dtypes": describe_dtypes(),
        "cpu kernels": describe_cpu_kernels(),
        "cuda": describe_cuda(),
        "cupy": describe_cupy(),
        "cuda kernels": describe_cuda_kernels(),
    }


def examine_kernels(folder: Path, device: str, dtype: str | None) -> dict[str, Any]:
    """Return which kernel runs each linear of a checkpoint and why others refused, equal cases together.

    dtype: that of the activations; None is the one that `quantc.load` would choose. Raises UsageError for an unknown
    device.
    """
    from ..kernels.registry import choose
    from .load import choose_for

    reader, place = CheckpointReader(folder), parse_device(device)
    kind = getattr(torch, dtype) if dtype else choose_for(reader, place)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, entry in reader.entries.items():
        spec, (n, k) = entry.spec, entry.shape
        choice = choose(spec, (n, k), place, kind)
        refused = {kernel: str(reason) for kernel, reason in choice.refused.items()}
        facts = {"label": spec.label(), "shape": [n, k], "kernel": choice.kernel.name, "refused": refused}
        key = (spec, n, k, choice.kernel.name, *refused.items())
        groups.setdefault(key, {**facts, "names": []})["names"].append(name)
    return {
        "checkpoint": str(folder),
        "dtype": name_of(kind),
        "device": device,
        "linears": [{"count": len(group["names"]), **group} for group in groups.values()],
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cpu() -> tuple[str, list[str]]:
    """Return the processor's name, and those of FEATURES it has; none where /proc does not tell."""
    facts: dict[str, str] = {}
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in FEATURES if feature in flags]


def describe_cpu_kernels() -> str:
    """Say in one or two sentences which instructions the native kernels use or why there are none."""
    from ..kernels.cpu import library
    from ..kernels.cpu.library import INT8_VARIABLE
    from ..kernels.cpu.native import NATIVE

    if isinstance(library.load(), str):
        return f"{library.describe()} torch runs everything."
    if NATIVE.int8:
        return f"{library.describe()} Activations are rounded to int8, as {INT8_VARIABLE} asks."
    return f"{library.describe()} Activations keep their dtype."


def describe_cuda() -> str:
    """Say in one sentence which GPU torch sees, or why it sees none."""
    built = torch.version.cuda
    if built is None:
        return f"This torch ({torch.__version__}) is built without CUDA, so everything runs on the CPU."
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {built} but finds no usable GPU; check the driver with nvidia-smi."
    parts = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{p.name} ({size(p.total_memory)}, compute {p.major}.{p.minor})" for p in parts)
    return f"torch uses CUDA {built} on {names}."


def describe_cupy() -> str:
    """Return a sentence on CuPy, which compiles the CUDA kernels."""
    from ..kernels.cuda.device import cupy_packages

    if find_spec("cupy") is None:
        return f"CuPy is not installed; CUDA kernels need it: pip install {cupy_packages()}."
    try:
        import cupy
    except Exception as error:  # a broken CUDA installation raises anything from ImportError to OSError
        return f"CuPy is installed but cannot be imported: {str(error).strip().splitlines()[0]}"
    return f"CuPy {cupy.__version__} is installed."


def describe_cuda_kernels() -> str:
    """Say for each kind of GPU whether the CUDA kernels are ready, or why they cannot run."""
    places: list[torch.device | None] = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return " ".join(dict.fromkeys(map(_cuda_kernels_on, places or [None])))


def _cuda_kernels_on(place: torch.device | None) -> str:
    from ..kernels.cuda.build import CACHE, nvrtc_version
    from ..kernels.cuda.device import architecture, device_index, unavailable

    reason = unavailable(place)
    if reason is not None:
        return f"Not ready: a CUDA kernel {reason}."
    made_by = "NVRTC {}.{}".format(*nvrtc_version())
    return f"Ready: compiled for {architecture(device_index(place))} by {made_by}, kept in {disk_cache.folder(CACHE)}."
