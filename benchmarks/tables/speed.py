"""Tables of speed and cost: tokens and products on CPUs, sizes, time and memory of quantizing."""

from __future__ import annotations

from collections.abc import Callable

from ..common import markdown
from .results import MISSING, find, gigabytes, load, megabytes, seconds, uniform

# Each benchmark named its contestants in its own way: label -> the names of one contestant.
CONTESTANTS = {
    "original": ("bfloat16", "original"),
    "original, torch.compile": ("bfloat16, static cache and torch.compile", "original, static cache and torch.compile"),
    "4 bits": ("w4, plain",),
    "4 bits, compiled": ("w4, compile=True",),
    "4 bits, 8-bit head": ("w4-head8, plain", "w4h8, plain"),
    "4 bits, 8-bit head, compiled": ("w4-head8, compile=True", "w4h8, compile=True"),
    "the same, `QUANTC_CPU_INT8=1`": ("w4h8, compile=True, int8 activations",),
    "OpenVINO, 4 bits": ("OpenVINO",),
    "llama.cpp `Q4_1`": ("llama.cpp",),
}
MACHINES = {
    "Zen 5, AVX-512": "cpu_decode.json", "Xeon, AMX": "cpu_decode_amx.json",
    "AVX2, one thread": "cpu_decode_avx2.json", "AVX2": "cpu_decode_avx2_2_threads.json",
}  # fmt: skip
ROWS = (1, 4, 16, 64)


def decode() -> str:
    return markdown([
        {"model": label, **{machine: _tokens(file, names) for machine, file in MACHINES.items()}}
        for label, names in CONTESTANTS.items()
    ])  # fmt: skip


def decode_best() -> str:
    """The table of the README: quantc as fast as it goes beside others with 4 bits and an 8-bit head."""
    shown = ("original", "OpenVINO, 4 bits", "llama.cpp `Q4_1`", "4 bits, 8-bit head, compiled")
    machines = list(MACHINES.items())[:3]
    return markdown([
        {
            "tokens a second": f"**quantc, {label}**" if "compiled" in label else label,
            **{machine: _tokens(file, CONTESTANTS[label]) for machine, file in machines},
        }
        for label in shown
    ])  # fmt: skip


def _tokens(file: str, names: tuple[str, ...]) -> str:
    row = next((row for row in load(file)["rows"] if row["model"] in names), None)
    if row is None:
        return MISSING
    ratio = row.get("x bfloat16", row.get("x original"))
    return f"{ratio:.1f} ({1000 / row['ms a token']:.0f}/s)"


def products() -> str:
    """Products of 4096 x 4096, times as fast as torch's F.linear of the same dtype."""
    cases = [
        ("Zen 5, AVX-512", "cpu_matmul.json", "bfloat16"),
        ("Xeon, AMX", "cpu_matmul_amx.json", "bfloat16"),
        ("AVX2", "cpu_matmul_avx2_7b.json", "float32"),
    ]
    return markdown([
        {
            "machine": machine, "activations": dtype, "bits": str(bits),
            **{f"{rows} row{'s' * (rows > 1)}": _product(file, bits, dtype, rows) for rows in ROWS},
        }
        for machine, file, dtype in cases
        for bits in (2, 4, 8)
    ])  # fmt: skip


def _product(file: str, bits: int, dtype: str, rows: int) -> str:
    row = find(file, **{"N x K": "4096 x 4096", "M": rows, "what": f"w{bits} {dtype}"})
    return MISSING if row is None else f"{row[f'x F.linear {dtype}']:.1f}"


def sizes() -> str:
    """Weight files as written, beside the file that was read."""
    large = find("memory.json", method="gptq", layers=48) or {}
    rows = [_size("Llama, 2.1 billion parameters", 4, "16 bits", large["quantized_bytes"], large["checkpoint_bytes"])]
    for model, widths in (("Gemma-3-270M", (4,)), ("SmolLM2-135M", (4, 3))):
        for bits in widths:
            row = uniform(model, bits, "balanced") or {}
            rows.append(_size(model, bits, "16 bits", row["weights_bytes"], row["source_bytes"]))
    for row in load("builtin_and_head8.json"):
        if row["settings"].get("head_bits") == 8 and row["method"] == "balanced":
            rows.append(_size(row["model"], row["bits"], "8 bits", row["weights_bytes"], row["source_bytes"]))
    return markdown(rows)


def _size(model: str, bits: int, outside: str, packed: int, source: int) -> dict[str, str]:
    return {
        "model": model, "bits": str(bits), "embedding and head": outside, "written": megabytes(packed),
        "read": megabytes(source),
    }  # fmt: skip


def memory() -> str:
    rows = [*load("memory.json")["rows"], *load("memory_training.json")["rows"][2:]]
    names = {"rtn": "round to nearest", "gptq": "GPTQ", "tune": "GPTQ and `tune`", "best": "`best`"}
    return markdown([
        {
            "method": names[row["method"]], "blocks": str(row["layers"]),
            "checkpoint": gigabytes(row["checkpoint_bytes"]),
            "peak memory": gigabytes(row["peak_rss_bytes"]), "CPU s": seconds(row["cpu_seconds"]),
        }
        for row in rows
    ])  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "decode": decode,
    "decode-best": decode_best, "products": products, "sizes": sizes, "memory": memory,
}  # fmt: skip
