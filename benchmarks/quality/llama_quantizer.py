"""llama.cpp's own quantizer, called through ctypes: mainline's, where no `llama-quantize` is at hand.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xf node-llama-cpp-linux-x64-3.22.1.tgz
    python -m benchmarks.quality.llama_quantizer package/bins/linux-x64 FLOATS.gguf OUT.gguf MIX [--imatrix FILE]

The npm package brings libllama.so of the release v0.5.0 with all of its C functions. Run in a process of its own, so
that it meets no other build of the library.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

# Numbers of llama_ftype. A mix with S, M or L is a rule for which tensors get more bits.
MIXES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25,
    "IQ4_XS": 30,
}  # fmt: skip
DEFAULT_FTYPE = MIXES["Q8_0"]


class _Importance(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class _Params(ctypes.Structure):
    """llama_model_quantize_params of v0.5.0; the rest is room for fields of later releases."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_type", ctypes.c_int32),
        ("embedding_type", ctypes.c_int32),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("importance", ctypes.POINTER(_Importance)),
        ("rest", ctypes.c_void_p * 8),
    )


def run_quantizer(library: Path, floats: Path, out: Path, mix: str, importance: Path | None = None) -> None:
    """Make a GGUF file of a mix from one of floats, in another process; raises RuntimeError with llama.cpp's words.

    library: the folder of libllama*.so. importance: a matrix as `llama-imatrix` writes it into .dat files.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, str(library), str(floats), str(out), mix]
    command += [] if importance is None else ["--imatrix", str(importance)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp cannot make {mix} of {floats}: {done.stderr.strip()[-500:]}")


def quantize(library: Path, floats: Path, out: Path, mix: str, importance: dict[str, bytes], threads: int) -> None:
    """Make a GGUF file in this process; raises RuntimeError where llama.cpp refuses or has other structs."""
    llama = _load(library)
    params = llama.llama_model_quantize_default_params()
    if (params.ftype, params.quantize_output, params.pure, params.dry_run) != (DEFAULT_FTYPE, True, False, False):
        raise RuntimeError(f"{library} has another build of llama.cpp than v0.5.0; its structs are not known.")
    params.threads, params.ftype = threads, MIXES[mix]
    items = _items(importance)
    if importance:
        params.importance = items
    if llama.llama_model_quantize(os.fsencode(floats), os.fsencode(out), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize failed for {mix}")


def _load(library: Path) -> Any:
    (file,) = library.glob("libllama.*so*")
    llama = ctypes.CDLL(str(file.resolve()))
    llama.llama_model_quantize_default_params.restype = _Params
    llama.llama_backend_init()
    return llama


def _items(importance: dict[str, bytes]) -> Any:
    """Return the list that llama.cpp takes, with an item without a name at its end."""
    items = (_Importance * (len(importance) + 1))()
    for item, (name, values) in zip(items, importance.items(), strict=False):
        item.size = len(values) // ctypes.sizeof(ctypes.c_float)
        item.data = (ctypes.c_float * item.size).from_buffer_copy(values)
        item.name = name.encode()
    return items


def read_importance(file: Path) -> dict[str, bytes]:
    """Return a matrix as float32 bytes by tensor, each divided by its number of calls."""
    found: dict[str, bytes] = {}
    with file.open("rb") as stream:
        (count,) = struct.unpack("<i", stream.read(4))
        for _ in range(count):
            (length,) = struct.unpack("<i", stream.read(4))
            name = stream.read(length).decode()
            calls, size = struct.unpack("<ii", stream.read(8))
            values = struct.unpack(f"<{size}f", stream.read(4 * size))
            found[name] = struct.pack(f"<{size}f", *(value / max(1, calls) for value in values))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("floats", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("mix", choices=sorted(MIXES))
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    importance = {} if args.imatrix is None else read_importance(args.imatrix)
    quantize(args.library, args.floats, args.out, args.mix, importance, args.threads)


if __name__ == "__main__":
    main()
