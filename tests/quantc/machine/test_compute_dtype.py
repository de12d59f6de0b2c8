"""Which dtype models are computed in where nobody names one, and that every door asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import quantc
from quantc.calibration.tokens import _writing_dtype
from quantc.checkpoint.reader import CheckpointReader
from quantc.evaluation import evaluate, models
from quantc.frontend import open_model
from quantc.machine import compute_dtype, memory
from quantc.machine.compute_dtype import Choice, choose_dtype, describe_dtypes, has_fast_bfloat16, slowness
from quantc.progress import LogProgress
from quantc.runtime.load import stored_dtype, unpacked_values
from tests.families import build
from tests.helpers import save_with_tokenizer

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without products of half floats, and a gigabyte of free memory."""
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: 4.0)
    monkeypatch.setattr(compute_dtype, "available_bytes", lambda: 10**9)


def save_in(dtype: torch.dtype, folder: Path) -> None:
    model = build("llama").to(dtype)
    model.config.dtype = dtype
    save_with_tokenizer(model, folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("built")
    save_in(torch.bfloat16, folder / "original")
    quantc.quantize(folder / "original", bits=4, group_size=32, method="rtn", out=folder / "packed")
    return folder


@pytest.mark.parametrize("stored", HALVES)
def test_a_stored_dtype_that_is_multiplied_is_computed_in(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: 0.6)
    assert choose_dtype(stored, CPU, 10**15) == Choice(stored)


@pytest.mark.parametrize("stored", HALVES)
@pytest.mark.usefixtures("slow")
def test_one_that_is_not_is_computed_in_float32(stored: torch.dtype) -> None:
    why = f"this processor has no {str(stored)[6:]} products"
    assert choose_dtype(stored, CPU, 10**6) == Choice(torch.float32, why)
    assert choose_dtype(stored, torch.device("cuda"), 10**6) == Choice(stored)
    for other in (torch.float32, torch.float64):
        assert choose_dtype(other, CPU, 10**6) == Choice(other)


@pytest.mark.usefixtures("slow")
def test_the_stored_dtype_stays_where_memory_is_short() -> None:
    assert choose_dtype(torch.bfloat16, CPU, 200_000_000).dtype == torch.float32
    kept = choose_dtype(torch.bfloat16, CPU, 200_000_001)
    assert kept.dtype == torch.bfloat16
    assert kept.short
    assert kept.why == (
        "this processor has no bfloat16 products, but float32 needs 800 MB for the weights and 1.00 GB are free, so "
        "that it stays slow"
    )


def test_half_floats_are_slow_exactly_where_torch_has_no_instructions_for_them() -> None:
    """In a process of its own, limited to AVX2: the ratio is 4 there, and what is asked for is that it is seen."""
    code = (
        "import torch; torch.set_num_threads(2); from quantc.machine.compute_dtype import *\n"
        "print(*map(multiplies, (torch.float32, *HALF)), has_fast_bfloat16(torch.device('cpu')))\n"
        "print(torch.get_num_threads())"
    )
    limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a processor with AVX2")
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **limited}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["True", "False", "False", "False", "2"]


def test_calibration_goes_by_flags_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: pytest.fail("it must not depend on time"))
    for variable in compute_dtype.ONEDNN_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert has_fast_bfloat16(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_amx")
    assert has_fast_bfloat16(CPU)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "avx2")
    assert not has_fast_bfloat16(CPU)
    assert not has_fast_bfloat16(torch.device("meta"))


def test_the_doctor_says_what_is_computed_in_what(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {torch.bfloat16: 0.55, torch.float16: 4.0}
    monkeypatch.setattr(compute_dtype, "slowness", times.__getitem__)
    assert describe_dtypes() == (
        "float16 models are computed in float32 here: this processor has no float16 products (measured: a matmul takes "
        "0.6 times as long in bfloat16 and 4.0 times as long in float16 as in float32)."
    )
    times[torch.float16] = 1.0
    assert describe_dtypes().startswith("Models are computed in the dtype they are stored in (measured: ")
    times.update({torch.bfloat16: 4.0, torch.float16: 4.0})
    assert describe_dtypes().startswith(
        "bfloat16 and float16 models are computed in float32 here: this processor has no bfloat16 or float16 products"
    )


def test_a_checkpoint_names_the_dtype_of_its_original(built: Path) -> None:
    """The skeleton that is quantized is built in float32, which transformers then writes into its config."""
    assert open_model(built / "original").model.config.dtype == torch.bfloat16
    assert stored_dtype(CheckpointReader(built / "packed").config) == torch.bfloat16


@pytest.mark.usefixtures("slow")
def test_load_computes_in_float32_unless_a_dtype_is_named(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "quantc"):
        model = quantc.load(built / "packed")
    assert model.dtype == torch.float32
    assert caplog.messages == [f"{built / 'packed'}: computed in float32, as this processor has no bfloat16 products"]
    named = quantc.load(built / "packed", dtype=torch.bfloat16)
    assert named.dtype == torch.bfloat16
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        wide, exact = model(tokens).logits, quantc.load(built / "packed", dtype=torch.float32)(tokens).logits
        narrow = named(tokens).logits
    assert torch.equal(wide, exact)
    assert narrow.dtype == torch.bfloat16


def test_load_keeps_a_dtype_that_is_multiplied(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_dtype, "slowness", lambda dtype: 0.6)
    assert quantc.load(built / "packed").dtype == torch.bfloat16


def test_floats_that_are_not_packed_are_counted(built: Path) -> None:
    model = quantc.load(built / "packed", dtype=torch.float32)
    floats = sum(parameter.numel() for parameter in model.parameters())
    assert unpacked_values(CheckpointReader(built / "packed")) == floats
    everything = sum(parameter.numel() for parameter in build("llama").parameters())
    assert 0 < floats < everything


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "int8"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_config_names_its_dtype(config: dict[str, str], expected: torch.dtype) -> None:
    assert stored_dtype(config) == expected


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("named", [None, "bfloat16"])
def test_eval_computes_both_models_in_one_dtype(
    built: Path, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[PreTrainedModel] = []
    monkeypatch.setattr(evaluate, "load_any", lambda *args: loaded.append(models.load_any(*args)) or loaded[-1])
    monkeypatch.setattr("quantc.evaluation.scores.measure_decode_speed", lambda *_: 1.0)
    (built / "text.txt").write_text("the cat sat on the mat and the dog ran to the house " * 8, encoding="utf-8")
    result = quantc.evaluate(
        built / "packed", text=str(built / "text.txt"), against=built / "original", context=16, windows=1, dtype=named
    )
    expected = named or "float32"
    assert [str(model.dtype) for model in loaded] == [f"torch.{expected}"] * 2
    assert (result.dtype, result.dtype_reason) == (
        expected, "" if named else "this processor has no bfloat16 products"
    )  # fmt: skip


@pytest.mark.usefixtures("slow")
def test_models_in_different_dtypes_are_compared_in_one(built: Path, tmp_path: Path) -> None:
    save_in(torch.float16, tmp_path / "float16")
    both = [built / "packed", open_model(tmp_path / "float16")]
    assert models.choose_common(both[:1], CPU) == Choice(torch.float32, "this processor has no bfloat16 products")
    assert models.choose_common(both, CPU) == Choice(torch.float32)
    assert models.choose_common(both[:1], torch.device("cuda")) == Choice(torch.bfloat16)


@pytest.mark.usefixtures("slow")
def test_memory_of_both_models_counts_and_is_noted(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [built / "packed", open_model(built / "original")]
    values = [unpacked_values(CheckpointReader(built / "packed")), sum(p.numel() for p in build("llama").parameters())]
    notes: list[str] = []
    progress = LogProgress()
    monkeypatch.setattr(progress, "note", notes.append)
    monkeypatch.setattr(compute_dtype, "available_bytes", lambda: 5 * sum(values))
    assert evaluate.common_dtype(models, "cpu", progress).dtype == torch.float32
    monkeypatch.setattr(compute_dtype, "available_bytes", lambda: 5 * sum(values) - 5)
    assert evaluate.common_dtype(models, "cpu", progress).dtype == torch.bfloat16
    assert evaluate.common_dtype(models[:1], "cpu", progress).dtype == torch.float32
    assert len(notes) == 1
    assert notes[0].startswith("computed in bfloat16: this processor has no bfloat16 products, but float32 needs ")


def test_a_config_without_a_dtype_takes_that_of_the_weights(built: Path) -> None:
    source = open_model(built / "original")
    source.model.config.dtype = None
    assert models._source_dtype(source) == torch.bfloat16


def test_a_model_writes_its_own_calibration_text_in_what_is_fast(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(built / "original")
    for fast, total, expected in (
        (True, 1 << 40, torch.bfloat16), (False, 1 << 40, torch.float32), (False, 1 << 10, torch.bfloat16)
    ):  # fmt: skip
        monkeypatch.setattr("quantc.calibration.tokens.has_fast_bfloat16", lambda _, fast=fast: fast)
        monkeypatch.setattr("psutil.virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert _writing_dtype(source) == expected


def test_slowness_is_measured_once() -> None:
    slowness.cache_clear()
    assert slowness(torch.float32) == slowness(torch.float32) > 0
    assert slowness.cache_info().misses == 1


def test_free_memory_is_what_the_container_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(memory, "LIMITS", tmp_path)
    assert memory.available_bytes() == 1000
    for name, text in (("max", "700\n"), ("current", "500\n"), ("stat", "anon 400\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
    assert memory.available_bytes() == 250
    (tmp_path / "memory.max").write_text("200\n", encoding="utf-8")
    assert memory.available_bytes() == 0
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert memory.available_bytes() == 1000
