"""`quantc doctor --measure`: what is timed and how it is shown. No time is compared with a bound."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
import torch

from quantc.kernels.cpu import library
from quantc.runtime import kernel_speed
from quantc.runtime.kernel_speed import limit_of, measure_kernels, read_bandwidth
from tests.quantc.cli_runner import run

SMALL = (64, 256)
ROW = {
    "bits": 4, "x": "float32", "kernel": "native", "cached_ns_per_weight": 0.05, "ns_per_weight": 0.0625,
    "gb_per_s": 8.5, "times_float32_linear": 3.25, "limit": "memory",
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights so small that measuring costs nothing."""
    for name, value in (("CACHED", SMALL), ("COLD", SMALL), ("COLD_BYTES", 20_000), ("SECONDS", 0.0)):
        monkeypatch.setattr(kernel_speed, name, value)
    monkeypatch.setattr(kernel_speed, "read_bandwidth", lambda: 12.5)


needs_library = pytest.mark.skipif(isinstance(library.load(), str), reason="the native kernels were not built")


@needs_library
@pytest.mark.usefixtures("small")
def test_both_widths_and_dtypes_are_timed_on_the_threads_of_torch() -> None:
    found = measure_kernels()
    assert isinstance(found, dict)
    assert (found["level"], found["threads"], found["read_gb_per_s"]) == (
        library.level(), torch.get_num_threads(), 12.5
    )  # fmt: skip
    assert [(row["bits"], row["x"], row["kernel"]) for row in found["rows"]] == [
        (bits, dtype, "native") for bits in (4, 8) for dtype in ("float32", "bfloat16")
    ]


@needs_library
@pytest.mark.usefixtures("small")
def test_figures_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls that take 1 us in the cache, 2 us from memory, and 8 us for F.linear."""
    turns: list[dict[str, int]] = []

    def timed(calls: dict[str, list[Any]], seconds: float) -> dict[str, float]:
        turns.append({name: len(alike) for name, alike in calls.items()})
        for alike in calls.values():
            assert alike[0]().shape == (1, SMALL[0])
        return {name: 8e-6 if name == "linear" else 2e-6 if "linear" in calls else 1e-6 for name in calls}

    monkeypatch.setattr(kernel_speed, "best_in_turns", timed)
    found = measure_kernels()
    assert isinstance(found, dict)
    row, weights, packed = found["rows"][0], prod(SMALL), prod(SMALL) // 2 + SMALL[0] * (2 * 2 + 1)
    assert row["cached_ns_per_weight"] == pytest.approx(1e3 / weights)
    assert row["ns_per_weight"] == pytest.approx(2e3 / weights)
    # Two groups a row: a float16 scale for each, and two zero points of 4 bits.
    assert row["gb_per_s"] == pytest.approx(packed / 2e3)
    assert row["times_float32_linear"] == pytest.approx(4.0)
    assert turns[:2] == [{"float32": 1, "bfloat16": 1}, {"float32": 3, "bfloat16": 3, "linear": 2}]


@needs_library
@pytest.mark.usefixtures("small")
def test_weights_that_take_turns_share_no_memory() -> None:
    calls = kernel_speed._Weights(4, SMALL).calls(torch.float32, 3)
    images = {call.args[1].image.data_ptr() for call in calls}
    assert len(images) == 3
    assert torch.equal(calls[0](), calls[2]())


@pytest.mark.parametrize(
    ("gb_per_s", "ns", "limit"), [(7.0, 1.0, "memory"), (6.9, 0.6, "arithmetic"), (6.9, 0.61, "both")]
)
def test_what_limits_a_kernel(gb_per_s: float, ns: float, limit: str) -> None:
    assert limit_of({"gb_per_s": gb_per_s, "ns_per_weight": ns, "cached_ns_per_weight": 0.5}, 10.0) == limit


def test_bandwidth_is_of_bytes_and_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_speed, "best_in_turns", lambda calls, seconds, **_: {"": 0.5})
    monkeypatch.setattr(torch, "ones", lambda count: torch.zeros(1000, dtype=torch.float32))
    assert read_bandwidth() == 4000 / 0.5 / 1e9


def test_a_machine_that_cannot_be_measured_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "was not built")
    assert measure_kernels() == "Not measured: the native CPU kernel was not built."
    assert "Not measured: the native CPU kernel was not built." in run("doctor", "--measure").stdout


@needs_library
def test_little_memory_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_speed, "available_bytes", lambda: 10**8)
    said = "Not measured: that takes 734 MB of memory, and 100 MB are free; end other programs."
    assert measure_kernels() == said


@needs_library
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 64 bytes")])
def test_memory_that_runs_out_gets_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bits: int) -> list[dict[str, Any]]:
        raise error

    monkeypatch.setattr(kernel_speed, "_rows_of", fail)
    said = "Not measured: there was no memory for it; 734 MB are needed, so end other programs."
    assert json.loads(run("doctor", "--measure", "--json").stdout)["measured"] == said


@needs_library
def test_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_speed, "_rows_of", lambda bits: [][bits])
    with pytest.raises(IndexError):
        measure_kernels()


def test_doctor_shows_the_figures_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"level": "avx2", "threads": 2, "read_gb_per_s": 12.5, "rows": [ROW]}
    monkeypatch.setattr(kernel_speed, "measure_kernels", lambda: measured)
    assert json.loads(run("doctor", "--measure", "--json").stdout)["measured"] == measured
    shown = run("doctor", "--measure", columns=160).stdout
    assert "Speed for one row on 2 threads with avx2; memory is read at 12.5 GB/s" in shown
    line = next(line for line in shown.splitlines() if "native " in line and "float32" in line)
    assert line.split() == ["4", "float32", "native", "0.0500", "0.0625", "8.50", "3.25", "memory"]
    assert "measured" not in json.loads(run("doctor", "--json").stdout)
    assert "Speed for one row" not in run("doctor").stdout
