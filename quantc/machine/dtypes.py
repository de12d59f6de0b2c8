"""The names that safetensors files have for dtypes."""

from __future__ import annotations

import torch

# Those of checkpoints, widest first: the order of tensors in a shard.
DTYPE_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Those of folders that are written for other runtimes, too.
WRITTEN_NAMES = DTYPE_NAMES | {torch.float8_e4m3fn: "F8_E4M3"}
WRITTEN_DTYPES = {name: dtype for dtype, name in WRITTEN_NAMES.items()}
# What files of other tools hold, too.
KNOWN_DTYPES = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64, "U16": torch.uint16,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
