"""Whether CUDA kernels can run on a device, and if not, why: as the end of a sentence that starts with their name."""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec

import torch

from . import build

log = logging.getLogger(__name__)

OLDEST = 75  # Turing: the first with the matrix instruction that the kernels build on

CUPY_PACKAGES = {  # by torch's CUDA
    "12": "'cupy-cuda12x>=14' nvidia-cuda-nvrtc-cu12",
    "13": "'cupy-cuda13x>=14' 'nvidia-cuda-nvrtc>=13,<14'",
}

_failures: dict[int, str] = {}  # by index of the device


def unavailable(device: torch.device | None = None) -> str | None:
    """Return None if CUDA kernels can be built and started on a device (None: the current one); else why not.

    After record_failure the reason is what failed. Costs microseconds from the second call for a device on.
    """
    if device is not None and device.type != "cuda":
        return f"runs on cuda, not on {device.type}"
    reason = _without_driver() or _without_compiler()
    if reason is not None:
        return reason
    index = device_index(device)
    return _failures.get(index) or _refused_device(index)


def record_failure(device: torch.device, error: Exception) -> str:
    """Make CUDA kernels unavailable on a device from now on; warns the first time. Returns the reason."""
    index = device_index(device)
    if index not in _failures:
        _failures[index] = f"failed on cuda:{index}: {first_line(error).rstrip('.')}"
        log.warning("No CUDA kernel runs on cuda:%d, a slower one takes its place: %s", index, error)
    return _failures[index]


def device_index(device: torch.device | None) -> int:
    """Return the number of a CUDA device; without one, the current device's."""
    return torch.cuda.current_device() if device is None or device.index is None else device.index


@functools.cache
def architecture(index: int) -> str:
    """Return what to compile for, such as "sm_90": the newest that NVRTC knows and whose code the GPU runs."""
    return f"sm_{_newest_known(_capability(index))}"


@functools.cache
def shared_limit(index: int) -> int:
    """Return the bytes of shared memory that one block can ask for."""
    from cupy.cuda import runtime

    return int(runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index))


def cupy_packages() -> str:
    """Return what to pip install for the CUDA version that torch is built for."""
    major = (torch.version.cuda or "").split(".")[0]
    return CUPY_PACKAGES.get(major, " or, for CUDA 13, ".join(CUPY_PACKAGES.values()))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; the name of its class if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


@functools.cache
def _without_driver() -> str | None:
    if torch.version.cuda is None:
        return f"needs CUDA, and this torch ({torch.__version__}) is built without it"
    if not torch.cuda.is_available():
        return "needs a GPU, and torch finds none that it can use; check the driver with nvidia-smi"
    return None


@functools.cache
def _without_compiler() -> str | None:
    if find_spec("cupy") is None:
        return f"needs CuPy, which is not installed: pip install {cupy_packages()}"
    try:
        from cupy.cuda import driver, runtime
    except Exception as error:  # a broken installation raises anything from ImportError to OSError
        return f"needs CuPy, which is installed but cannot be imported: {first_line(error)}"
    try:
        version = build.nvrtc_version()
    except Exception as error:
        package = _nvrtc_package(driver.get_build_version() // 1000)
        return f"needs NVRTC, which CuPy cannot load ({first_line(error)}): pip install {package}"
    newest = runtime.driverGetVersion()
    if newest // 1000 < version[0]:
        return (
            f"is compiled by NVRTC {_dotted(version)}, and the driver runs CUDA {newest // 1000}.{newest % 1000 // 10} "
            f"at most: update the driver, or uninstall CuPy and pip install {cupy_packages()}"
        )
    return None


def _nvrtc_package(major: int) -> str:
    """Return what to pip install for a CuPy built for a major version of CUDA."""
    return "nvidia-cuda-nvrtc-cu12" if major == 12 else f"'nvidia-cuda-nvrtc=={major}.*'"


@functools.cache
def _refused_device(index: int) -> str | None:
    if index >= torch.cuda.device_count():
        return f"needs a GPU, and there is no cuda:{index}; torch finds {torch.cuda.device_count()}"
    capability = _capability(index)
    name = f"{torch.cuda.get_device_name(index)} has {capability // 10}.{capability % 10}"
    if capability < OLDEST:
        return f"needs compute capability {OLDEST // 10}.{OLDEST % 10} or later, and {name}"
    if _newest_known(capability) is None:
        version = _dotted(build.nvrtc_version())
        return f"is compiled by NVRTC {version}, which knows no such GPU ({name}): update it and CuPy"
    return None


def _capability(index: int) -> int:
    """Return a number such as 90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _newest_known(capability: int) -> int | None:
    """Return the newest architecture NVRTC knows for a GPU: code also runs on later ones with the same major number."""
    ask = getattr(build.load_nvrtc(), "getSupportedArchs", None)
    known = [capability] if ask is None else ask()
    return max((arch for arch in known if capability // 10 * 10 <= arch <= capability), default=None)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
