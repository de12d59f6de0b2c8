"""Products of weights with dropped groups on every instruction set against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantc.errors import CheckpointError
from quantc.formats import GROUP_SPARSE
from quantc.kernels.base import DENSE_ONLY
from quantc.kernels.cpu import library, native, panels, steps
from quantc.kernels.cpu.native import NATIVE, NativeWeight
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose
from quantc.kernels.rotation import rotate
from quantc.numerics.qtensor import QTensor
from quantc.spec import SPARSE_GROUPS, QuantSpec

from .cases import DTYPES, FLOAT_LEVELS, built, check, random_weight

pytestmark = built
CPU = torch.device("cpu")


def drop(tensor: QTensor, uneven: bool) -> QTensor:
    """The same weight without some groups: any, or those of rows at the end first, so that some rows are empty."""
    spec, shape = tensor.spec, tensor.shape
    rows, columns = spec.scales_shape(shape)
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(5))
    if uneven:
        scores -= torch.arange(rows).unsqueeze(1)
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True)[: spec.kept_groups(shape)]] = True
    full = QTensor(spec, tensor.codes, tensor.scales, tensor.zeros, kept=kept.view(rows, columns))
    return GROUP_SPARSE.unpack(GROUP_SPARSE.pack(full), spec, shape)


def random_kept(spec: QuantSpec, shape: tuple[int, int], uneven: bool = False) -> QTensor:
    return drop(random_weight(spec, shape), uneven)


def prepare(tensor: QTensor, dtype: torch.dtype) -> NativeWeight:
    return NATIVE.prepare(GROUP_SPARSE.pack(tensor), tensor.spec, tensor.shape, dtype)


@st.composite
def weights(draw: st.DrawFn) -> QTensor:
    sparsity = draw(st.one_of(st.sampled_from([1e-9, 0.5, 1.0]), st.floats(0.01, 1)))
    spec = QuantSpec(
        draw(st.integers(2, 8)), draw(st.sampled_from(SPARSE_GROUPS)), symmetric=draw(st.booleans()), sparsity=sparsity
    )
    return random_kept(spec, (draw(st.integers(1, 70)), draw(st.integers(1, 300))), draw(st.booleans()))


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@settings(max_examples=60, deadline=None)
@given(tensor=weights(), rows=st.integers(1, 33), dtype=st.sampled_from(DTYPES))
def test_every_level_multiplies_as_float64_does(level: str, tensor: QTensor, rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, tensor.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    with library.forced(level):
        check(NATIVE.run(x, prepare(tensor, dtype)), x, tensor)


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@settings(max_examples=40, deadline=None)
@given(tensor=weights(), dtype=st.sampled_from(DTYPES))
def test_every_level_unpacks_the_reference_s_bits(level: str, tensor: QTensor, dtype: torch.dtype) -> None:
    out = torch.empty(tensor.shape, dtype=dtype)
    with library.forced(level):
        prepare(tensor, dtype).unpack(0, tensor.shape[0], out.T)
    assert torch.equal(out, tensor.dequantize(dtype))


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_row_of_bfloat16_has_a_kernel_of_its_own(level: str, symmetric: bool) -> None:
    """More kept groups than are widened at once, rows of every length, and a last group that is short."""
    for uneven in (False, True):
        tensor = random_kept(QuantSpec(4, 16, symmetric=symmetric, sparsity=0.4), (50, 2090), uneven)
        x = torch.randn(1, 2090, generator=torch.Generator().manual_seed(1)).bfloat16()
        with library.forced(level):
            check(NATIVE.run(x, prepare(tensor, x.dtype)), x, tensor)


@pytest.mark.parametrize("level", FLOAT_LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_low_rank_and_rotation(level: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    tensor = random_kept(QuantSpec(4, 16, rank=3, hadamard=64, sparsity=0.5), (40, 64))
    tensor.low_rank_a = torch.randn(3, 64, generator=generator).half()
    tensor.low_rank_b = torch.randn(40, 3, generator=generator).half()
    bias = torch.randn(40, generator=generator)
    weight = tensor.effective_weight().double()
    for rows in (1, 10):
        x = torch.randn(rows, 64, generator=generator).to(dtype)
        with library.forced(level):
            y = NATIVE.run(x, prepare(tensor, dtype), bias)
        exact = x.double() @ weight.T + bias.double()
        size = x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=1)
        assert bool(((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * (size + 4)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_go_through_panels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "PANEL_ROWS", 80)
    monkeypatch.setattr(native, "_is_for_panels", lambda w, rows, dtype: rows >= 60)  # whatever this processor has
    tensor = random_kept(QuantSpec(3, 16, sparsity=0.5), (190, 130))
    weight = prepare(tensor, dtype)
    assert len(panels.panels(weight)) > 1
    x = torch.randn(60, 130, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(190, generator=torch.Generator().manual_seed(2))
    y = NATIVE.run(x, weight, bias)
    expected = REFERENCE.run(x, REFERENCE.prepare(GROUP_SPARSE.pack(tensor), tensor.spec, tensor.shape, dtype), bias)
    size = x.double().abs() @ tensor.dequantize(torch.float64).abs().T
    assert bool(((y.double() - expected.double()).abs() <= 4 * torch.finfo(dtype).eps * (size + 4)).all())


def test_panels_have_rotation_and_low_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_is_for_panels", lambda w, rows, dtype: rows >= 60)
    generator = torch.Generator().manual_seed(3)
    tensor = random_kept(QuantSpec(3, 16, rank=3, hadamard=4, sparsity=0.5), (190, 132))
    tensor.low_rank_a = torch.randn(3, 132, generator=generator).half()
    tensor.low_rank_b = torch.randn(190, 3, generator=generator).half()
    x = torch.randn(60, 132, generator=generator)
    weight = tensor.effective_weight().double()
    error = (NATIVE.run(x, prepare(tensor, torch.float32)).double() - x.double() @ weight.T).abs()
    size = x.double().norm(dim=-1, keepdim=True) * weight.norm(dim=1)
    assert bool((error <= 4 * torch.finfo(torch.float32).eps * (size + 4)).all())


def test_strided_empty_and_unaligned_inputs() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.3), (33, 100))
    weight = prepare(tensor, torch.float32)
    wide = torch.randn(6, 401, generator=torch.Generator().manual_seed(1))
    for x in (wide[:, 1:101], wide[:, ::4][:, :100], wide[1::2, 201:301], wide.flatten()[3:203].view(2, 100)):
        before = x.clone()
        check(NATIVE.run(x, weight), x, tensor)
        assert torch.equal(x, before)
    assert NATIVE.run(torch.empty(0, 100), weight).shape == (0, 33)
    assert NATIVE.run(wide[0, :100], weight).shape == (33,)


def test_one_thread_and_many_give_the_same_bits() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (1000, 2048), uneven=True)
    x = torch.randn(9, 2048, generator=torch.Generator().manual_seed(1))
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


def test_the_image_grows_with_the_groups_that_stay() -> None:
    sizes = []
    for sparsity in (1e-9, 0.5, 0.9):
        tensor = random_kept(QuantSpec(4, 16, sparsity=sparsity), (512, 2048))
        sizes.append(prepare(tensor, torch.float32).image.nbytes)
    assert 0.5 <= sizes[1] / sizes[0] < 0.53
    assert 0.1 <= sizes[2] / sizes[0] < 0.13


def test_it_shares_a_call_with_dense_weights_of_the_same_inputs() -> None:
    kept = random_kept(QuantSpec(4, 16, sparsity=0.5), (40, 96))
    dense = random_weight(QuantSpec(4, 16), (50, 96))
    half = random_kept(QuantSpec(4, 16, sparsity=0.7), (30, 96))
    from .cases import prepare as prepare_dense

    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    prepared = [prepare(kept, x.dtype), prepare_dense(dense, x.dtype), prepare(half, x.dtype)]
    assert steps.available()
    together = torch.ops.quantc.native_step3(x, *(w.image for w in prepared), x, x, x, 0, 0, 0, 120)
    for y, tensor in zip(together.split([40, 50, 30]), (kept, dense, half), strict=True):
        check(y.view(1, -1), x, tensor)


def test_gradients_reach_the_activations() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (24, 64))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    NATIVE.run(x, prepare(tensor, torch.float32), torch.ones(24)).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, tensor.dequantize().sum(0).expand(3, 64), atol=1e-4)


def test_the_operator_has_shapes_without_values_and_equals_the_direct_call() -> None:
    weight = prepare(random_kept(QuantSpec(4, 16, sparsity=0.5), (24, 64)), torch.bfloat16)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    arguments = (weight.image, None, None, torch.ones(24), 24, 0, False)
    assert torch.equal(torch.ops.quantc.native_matmul(x, *arguments), NATIVE.run(x, weight, torch.ones(24)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = NATIVE.run(mode.from_tensor(x), weight)
    assert (y.shape, y.dtype) == ((2, 3, 24), torch.bfloat16)


def test_int8_activations_are_for_dense_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NATIVE, "int8", True)
    tensor = random_kept(QuantSpec(4, 16, hadamard=32, sparsity=0.5), (40, 96))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    check(NATIVE.run(x, prepare(tensor, torch.float32)), rotate(x, 32), tensor)


def test_which_weights_it_takes() -> None:
    spec = QuantSpec(4, 16, sparsity=0.5)
    assert choose(spec, (64, 64), CPU, torch.bfloat16).kernel is NATIVE
    assert NATIVE.supports(spec, (64, 1 << 18), CPU, torch.float32) == (
        "needs rows of up to 131056 inputs in groups of 16 where groups are dropped, not 262144"
    )
    assert NATIVE.supports(QuantSpec(4, 16, two_of_four=True), (64, 64), CPU, torch.float32) == DENSE_ONLY


def test_an_index_that_marks_too_many_groups_is_refused() -> None:
    tensor = random_kept(QuantSpec(4, 16, sparsity=0.5), (8, 64))
    parts = GROUP_SPARSE.pack(tensor)
    parts["kept"][:] = 255
    with pytest.raises(CheckpointError, match="marks 32 groups"):
        NATIVE.prepare(parts, tensor.spec, tensor.shape, torch.float32)
