"""The native CPU kernels on every instruction set against float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantc.kernels.cpu import library
from quantc.kernels.cpu.library import INT8_VARIABLE
from quantc.kernels.cpu.native import NATIVE
from quantc.spec import WHOLE_ROW, QuantSpec

from .cases import DTYPES, FLOAT_LEVELS, LEVELS, ROUNDED_FROM, built, check, prepare, random_weight, rounds_weights

pytestmark = built
CPU = torch.device("cpu")


@st.composite
def cases(draw: st.DrawFn) -> tuple[QuantSpec, tuple[int, int], int, torch.dtype]:
    grouping = draw(st.sampled_from(["per_oc", "per_ic"]))
    group = draw(st.one_of(st.sampled_from([8, 32, 64, 100, WHOLE_ROW]), st.integers(8, 150)))
    spec = QuantSpec(draw(st.integers(2, 8)), group, grouping, draw(st.booleans()))
    shape = (draw(st.integers(1, 70)), draw(st.integers(1, 300)))
    return spec, shape, draw(st.one_of(st.integers(1, 33), st.integers(34, 70))), draw(st.sampled_from(DTYPES))


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_level_multiplies_as_float64_does(
    level: str, case: tuple[QuantSpec, tuple[int, int], int, torch.dtype]
) -> None:
    spec, shape, rows, dtype = case
    tensor = random_weight(spec, shape)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    with library.forced(level):
        check(NATIVE.run(x, prepare(tensor, dtype)), x, tensor, rounds_weights(level, x, spec))


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_every_level_unpacks_the_reference_s_bits(
    level: str, case: tuple[QuantSpec, tuple[int, int], int, torch.dtype]
) -> None:
    spec, shape, _, dtype = case
    tensor = random_weight(spec, shape)
    weight = prepare(tensor, dtype)
    out = torch.empty(shape[1], shape[0], dtype=dtype)
    with library.forced(level):
        weight.unpack(0, shape[0], out)
    assert torch.equal(out.T, tensor.dequantize(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_int8_activations_that_are_integers_lose_nothing(
    level: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127 in every block makes its scale 1 / 127 * 127; what is left are integers, exact in every sum."""
    monkeypatch.setattr(NATIVE, "int8", True)
    for grouping in ("per_oc", "per_ic"):
        for symmetric in (False, True):
            spec, shape = QuantSpec(bits, 64, grouping, symmetric), (37, 200)
            tensor = random_weight(spec, shape)
            tensor.scales = torch.ones_like(tensor.scales)
            x = torch.randint(-127, 128, (5, 200), generator=torch.Generator().manual_seed(1)).float()
            x[:, ::32] = 127
            with library.forced(level):
                if not library.loaded().has_int8():
                    assert "has no int8 activations" in (NATIVE.supports(spec, shape, CPU, torch.float32) or "")
                    continue
                y = NATIVE.run(x, prepare(tensor, torch.float32))
            check(y, x, tensor)


@pytest.mark.parametrize("level", LEVELS)
def test_int8_activations_err_by_their_rounding_and_only_where_asked(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_weight(QuantSpec(4, 64), (48, 512))
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ tensor.dequantize(torch.float64).T
    with library.forced(level):
        check(NATIVE.run(x, prepare(tensor, torch.float32)), x, tensor)
        if not library.loaded().has_int8():
            return
        monkeypatch.setattr(NATIVE, "int8", True)
        error = (NATIVE.run(x, prepare(tensor, torch.float32)).double() - exact).norm() / exact.norm()
    # A step of max / 127 in blocks of 32 normal numbers, whose largest is about 2.1: 2.1 / 127 / sqrt(12).
    assert 0.002 < float(error) < 0.01


@pytest.mark.parametrize("level", LEVELS)
def test_infinite_activations_stay_visible(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_weight(QuantSpec(4, 32), (16, 64))
    for int8 in (False, True):
        monkeypatch.setattr(NATIVE, "int8", int8)
        for strange in (float("inf"), float("nan")):
            x = torch.ones(1, 64)
            x[0, 40] = strange
            with library.forced(level):
                assert not NATIVE.run(x, prepare(tensor, torch.float32)).isfinite().any()


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@pytest.mark.parametrize("grouping", ["per_oc", "per_ic"])
def test_many_rows_of_every_dtype_come_in_slabs(grouping: str, level: str) -> None:
    """One row more than a slab of weights made floats, and several parts of inputs, the last of them short."""
    for bits in (2, 3, 4, 5, 6, 8):
        tensor = random_weight(QuantSpec(bits, 40, grouping), (75, 650))
        for dtype in DTYPES:
            x = torch.randn(193, 650, generator=torch.Generator().manual_seed(1)).to(dtype)
            with library.forced(level):
                y = NATIVE.run(x, prepare(tensor, dtype))
            check(y, x, tensor, rounds_weights(level, x, tensor.spec))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_int8_sums_of_the_largest_codes_and_activations_do_not_overflow(
    level: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NATIVE, "int8", True)
    tensor = random_weight(QuantSpec(bits, 64), (37, 200))
    tensor.codes.fill_(tensor.spec.levels - 1)
    for rows in (1, 2, 3, 6, 7):
        for sign in (1, -1):
            x = torch.full((rows, 200), 127.0 * sign)
            with library.forced(level):
                if not library.loaded().has_int8():
                    return
                check(NATIVE.run(x, prepare(tensor, torch.float32)), x, tensor)


@pytest.mark.parametrize("level", [level for level in LEVELS if level in ROUNDED_FROM])
@pytest.mark.parametrize("grouping", ["per_oc", "per_ic"])
def test_more_rows_than_a_slab_whoever_else_multiplies_in_between(grouping: str, level: str) -> None:
    tensor = random_weight(QuantSpec(4, 64, grouping), (150, 1100))
    weight = prepare(tensor, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for rows in (530, 5, 1030):
        x = torch.randn(rows, 1100, generator=generator).bfloat16()
        with library.forced(level):
            check(NATIVE.run(x, weight), x, tensor, rounded_weights=True)
        other = torch.randn(40, 1100, generator=generator).bfloat16()
        exact = other.double() @ x.double().T
        assert (
            float(((other @ x.T).double() - exact).norm() / exact.norm()) < 0.01
        )  # torch sets tiles up in its own way


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_any_dtype_low_rank_and_rotation(dtype: torch.dtype) -> None:
    spec = QuantSpec(4, 32, rank=3, hadamard=64)
    tensor = random_weight(spec, (40, 64))
    generator = torch.Generator().manual_seed(3)
    tensor.low_rank_a = torch.randn(3, 64, generator=generator).half()
    tensor.low_rank_b = torch.randn(40, 3, generator=generator).half()
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    weight = tensor.effective_weight().double()
    size = x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    for bias_dtype in [*DTYPES, torch.float64]:
        bias = torch.randn(80, generator=generator).to(bias_dtype)[::2]
        y = NATIVE.run(x, prepare(tensor, dtype), bias)
        exact = x.double() @ weight.T + bias.double()
        error = (y.double() - exact).abs()
        assert bool((error <= 4 * torch.finfo(dtype).eps * (size + 4)).all())


def test_strided_empty_and_unaligned_inputs() -> None:
    tensor = random_weight(QuantSpec(4, 32), (33, 100))
    weight = prepare(tensor, torch.float32)
    wide = torch.randn(6, 401, generator=torch.Generator().manual_seed(1))
    for x in (wide[:, 1:101], wide[:, ::4][:, :100], wide[1::2, 201:301], wide.flatten()[3:203].view(2, 100)):
        before = x.clone()
        check(NATIVE.run(x, weight), x, tensor)
        assert torch.equal(x, before)
    assert NATIVE.run(torch.empty(0, 100), weight).shape == (0, 33)
    assert NATIVE.run(wide[0, :100], weight).shape == (33,)


def test_one_thread_and_many_give_the_same_bits() -> None:
    tensor = random_weight(QuantSpec(3, 64), (1000, 1024))
    x = torch.randn(9, 1024, generator=torch.Generator().manual_seed(1))
    weight = prepare(tensor, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(NATIVE.run(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    check(results[0], x, tensor)


def test_gradients_reach_the_activations() -> None:
    tensor = random_weight(QuantSpec(4, 32), (24, 64))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    NATIVE.run(x, prepare(tensor, torch.float32), torch.ones(24)).sum().backward()
    expected = tensor.dequantize().sum(0).expand(3, 64)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, atol=1e-4)


def test_the_operator_has_shapes_without_values_and_equals_the_direct_call() -> None:
    tensor = random_weight(QuantSpec(4, 32), (24, 64))
    weight = prepare(tensor, torch.bfloat16)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    arguments = (weight.image, None, None, torch.ones(24), 24, 0, False)
    assert torch.equal(torch.ops.quantc.native_matmul(x, *arguments), NATIVE.run(x, weight, torch.ones(24)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = NATIVE.run(mode.from_tensor(x), weight)
    assert (y.shape, y.dtype) == ((2, 3, 24), torch.bfloat16)


@pytest.mark.parametrize(
    ("spec", "device", "dtype", "reason"),
    [
        (QuantSpec(4, 32), "cuda", torch.float32, "runs on cpu, not on cuda"),
        (QuantSpec(4, 32), "cpu", torch.float64, "runs in float32, float16 and bfloat16, not in float64"),
        (QuantSpec(4, 4), "cpu", torch.float32, "needs per_oc groups of 8 or more, not 4"),
        (QuantSpec(4, 2, "per_ic"), "cpu", torch.float32, "needs per_ic groups of 4 or more, not 2"),
    ],
)
def test_why_it_does_not_run(spec: QuantSpec, device: str, dtype: torch.dtype, reason: str) -> None:
    assert NATIVE.supports(spec, (64, 64), torch.device(device), dtype) == reason


def test_the_environment_sets_level_and_arithmetic() -> None:
    program = (
        "from quantc.kernels.cpu import library, native; print(library.level(), native.NATIVE.int8, library.describe())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "QUANTC_CPU_LEVEL": "scalar", INT8_VARIABLE: "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("scalar True Ready: uses scalar of scalar")


def test_an_unknown_level_is_refused_by_name() -> None:
    from quantc.errors import UsageError

    wanted = "this CPU does not support QUANTC_CPU_LEVEL=mmx; choose one of scalar"
    with pytest.raises(UsageError, match=wanted), library.forced("mmx"):
        pass
