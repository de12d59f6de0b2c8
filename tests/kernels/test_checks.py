"""What a packed weight does not multiply: every kernel says so in nn.Linear's words, and writes nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quantc.kernels.base import Kernel
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE
from quantc.kernels.cpu.torch_int4 import TORCH_INT4
from quantc.kernels.cpu.trellis import NATIVE_TRELLIS
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import choose

from .weights import SPECS, K, N, filled, stored

CPU = torch.device("cpu")
WRONG = [(1, 2 * K), (1, 4096 * K), (4096, 2 * K), (0, 2 * K), (K - 1,), (2, 3, K + 1), (3, 0), (0,), ()]


def products() -> dict[str, tuple[torch.dtype, Callable[..., torch.Tensor]]]:
    """Each kernel with each kind of weight that it takes, and the module that chooses among them."""
    found: dict[str, tuple[torch.dtype, Callable[..., torch.Tensor]]] = {}
    for label, spec in SPECS.items():
        for dtype in (torch.float32, torch.bfloat16):
            chosen = choose(spec, (N, K), CPU, dtype).kernel
            kernels: tuple[Kernel, ...] = (
                (chosen,) if spec.wide_rows else (NATIVE, NATIVE_TRELLIS, TORCH_INT4, REFERENCE)
            )
            for kernel in kernels:
                if kernel.supports(spec, (N, K), CPU, dtype) is None:
                    weight = kernel.prepare(stored(spec), spec, (N, K), dtype)
                    name = f"{label}, {kernel.name}, {str(dtype)[6:]}"
                    found[name] = dtype, lambda x, bias=None, run=kernel.run, weight=weight: run(x, weight, bias)
    return found


PRODUCTS = products()
every_product = pytest.mark.parametrize("name", PRODUCTS)


@every_product
def test_shapes_that_a_linear_refuses_are_refused_in_its_words(name: str) -> None:
    dtype, multiply = PRODUCTS[name]
    linear = nn.Linear(K, N, bias=False, dtype=dtype)
    for shape in WRONG:
        x = torch.zeros(1, dtype=dtype).expand(shape) if shape else torch.zeros((), dtype=dtype)
        with pytest.raises(RuntimeError) as wanted:
            linear(x)
        with pytest.raises(RuntimeError) as found:
            multiply(x)
        assert str(found.value) == str(wanted.value)


@every_product
def test_no_rows_give_no_rows_and_one_row_needs_no_second_dimension(name: str) -> None:
    dtype, multiply = PRODUCTS[name]
    for shape in [(0, K), (2, 0, K), (K,), (1, 1, 1, K)]:
        y = multiply(torch.zeros(shape, dtype=dtype), torch.zeros(N))
        assert (y.shape, y.dtype) == ((*shape[:-1], N), dtype)


@every_product
@pytest.mark.parametrize("other", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_what_is_no_floating_number_is_refused(name: str, other: torch.dtype) -> None:
    dtype, multiply = PRODUCTS[name]
    with pytest.raises(RuntimeError, match=f"must have the same dtype, but got {str(other)[6:]} and"):
        multiply(torch.ones(2, K, dtype=other))
    with pytest.raises(RuntimeError, match=f"must have the same dtype, but got a bias of {str(other)[6:]}"):
        multiply(torch.ones(2, K, dtype=dtype), torch.ones(N, dtype=other))


@every_product
def test_a_bias_of_another_shape_or_device_is_refused(name: str) -> None:
    dtype, multiply = PRODUCTS[name]
    x = torch.ones(2, K, dtype=dtype)
    for shape in [(N - 1,), (N + 1,), (2 * N,), (1, N), (), (0,)]:
        with pytest.raises(RuntimeError) as found:
            multiply(x, torch.ones(shape))
        assert str(found.value) == f"a bias {shape} cannot be added to {N} outputs; it must be ({N},)"
    with pytest.raises(RuntimeError, match="on the same device, but found at least two devices, cpu and meta!"):
        multiply(x, torch.ones(N, device="meta"))


@pytest.mark.parametrize("label", SPECS)
def test_a_module_refuses_what_a_linear_refuses(label: str) -> None:
    module, linear = filled(SPECS[label]), nn.Linear(K, N)
    for _ in range(2):  # before and after it has prepared its weight
        for shape in WRONG:
            x = torch.zeros(1).expand(shape) if shape else torch.zeros(())
            with pytest.raises(RuntimeError) as wanted:
                linear(x)
            with pytest.raises(RuntimeError) as found:
                module(x)
            assert str(found.value) == str(wanted.value)
        with pytest.raises(RuntimeError, match="must have the same dtype, but got int64 and float32"):
            module(torch.ones(2, K).long())
        with pytest.raises(RuntimeError, match="found at least two devices, meta and cpu!"):
            module(torch.ones(2, K, device="meta"))
        assert module(torch.ones(2, K)).shape == (2, N)


@pytest.mark.skipif(isinstance(library.load(), str), reason="the native kernels were not built")
def test_the_operator_reads_no_image_that_is_cut_or_of_another_weight() -> None:
    weight = NATIVE.prepare(stored(SPECS["dense"]), SPECS["dense"], (N, K), torch.float32)
    multiply = torch.ops.quantc.native_matmul
    x = torch.ones(2, K)
    rest = (None, None, None)
    assert multiply(x, weight.image, *rest, N, 0, False).shape == (2, N)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        multiply(torch.ones(2, 2 * K), weight.image, *rest, N, 0, False)
    with pytest.raises(ValueError, match="is no weight of"):
        multiply(x, weight.image, *rest, 2 * N, 0, False)
    for image in (weight.image[:-1], weight.image[:7], torch.zeros(4096, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="are no image of a weight that this version packs"):
            multiply(x, image.clone(), *rest, N, 0, False)
    with pytest.raises(ValueError, match="a low-rank factor must be contiguous"):
        multiply(x, weight.image, torch.ones(3, K).half(), torch.ones(2, 3, 16).half(), None, N, 0, False)
