"""Memory that glibc keeps: threads that come and go get no arenas of their own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COUNT = """
import ctypes, tempfile, threading
from quantc.machine.memory import FreeMemory
if {limited}:
    FreeMemory()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
barrier = threading.Barrier(8)
def work():
    libc.malloc(1 << 20)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
"""


def arenas(limited: bool) -> int:
    run = subprocess.run(
        [sys.executable, "-c", COUNT.format(limited=limited)], capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="asks glibc for its arenas")
def test_threads_share_one_arena() -> None:
    assert arenas(limited=True) == 1 < arenas(limited=False)
