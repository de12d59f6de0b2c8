"""What tests of the CUDA kernels need besides a GPU."""

from __future__ import annotations

import pytest

from quantc.kernels.cuda.build import nvrtc_version


def _found() -> bool:
    try:
        nvrtc_version()
    except Exception:  # a missing or broken CuPy raises anything
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not _found(), reason="needs CuPy and NVRTC, which the extra dev brings on Linux")
