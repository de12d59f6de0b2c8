"""Operators of compiled graphs: the products of a direct call, one behind the other."""

from __future__ import annotations

import re

import pytest
import torch

from quantc.kernels.cpu import steps
from quantc.kernels.cpu.native import NATIVE
from quantc.spec import QuantSpec

from .cases import DTYPES, built, prepare, random_weight

pytestmark = [built, pytest.mark.skipif(not steps.available(), reason="this torch has no stable C interface")]
SIZES = (40, 17, 64, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hadamard", [0, 96])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_is_the_direct_calls(dtype: torch.dtype, hadamard: int, rows: int) -> None:
    spec = QuantSpec(4, 32, hadamard=hadamard)
    weights = [prepare(random_weight(spec, (n, 96), seed), dtype) for seed, n in enumerate(SIZES)]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 1, 96, generator=generator).to(dtype)
    biases = [torch.randn(n, generator=generator).to(kind) for n, kind in zip(SIZES, [*DTYPES, dtype], strict=True)]
    for count, name in enumerate(steps.NAMES, 1):
        for biased in (0, 1, 2**count - 1):
            images = [w.image for w in weights[:count]]
            given = [bias if biased >> i & 1 else x for i, bias in enumerate(biases[:count])]
            step = getattr(torch.ops.quantc, name)
            y = step(x, *images, *given, biased, hadamard, 0, sum(SIZES[:count]))
            parts = y.split([rows * n for n in SIZES[:count]])
            for i, (part, w) in enumerate(zip(parts, weights, strict=False)):
                expected = NATIVE.run(x, w, biases[i] if biased >> i & 1 else None)
                assert torch.equal(part.view(expected.shape), expected)


def test_what_it_cannot_read_is_an_error() -> None:
    weight = prepare(random_weight(QuantSpec(4, 32), (40, 96)), torch.float32)
    x = torch.ones(1, 96)
    with pytest.raises(RuntimeError):
        torch.ops.quantc.native_step1(torch.ones(96, 2).T, weight.image, x, 0, 0, 0, 40)  # not contiguous
    with pytest.raises(RuntimeError):
        torch.ops.quantc.native_step1(x.double(), weight.image, x, 0, 0, 0, 40)
    with pytest.raises(RuntimeError):
        torch.ops.quantc.native_step1(x, weight.image, x, 0, 7777, 0, 40)  # nothing in this process rotates so


def test_shapes_that_do_not_belong_together_are_an_error_in_torch_s_words() -> None:
    weight = prepare(random_weight(QuantSpec(4, 32), (40, 96)), torch.float32)
    other = prepare(random_weight(QuantSpec(4, 32), (40, 192)), torch.float32)
    step1, step2 = torch.ops.quantc.native_step1, torch.ops.quantc.native_step2
    for shape, words in [((1, 192), "1x192 and 96x40"), ((4096, 192), "4096x192 and 96x40"), ((0, 5), "0x5 and 96x40")]:
        x = torch.ones(shape)
        with pytest.raises(RuntimeError, match=re.escape(f"mat1 and mat2 shapes cannot be multiplied ({words})")):
            step1(x, weight.image, x, 0, 0, 0, 40)
    x = torch.ones(1, 96)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        step2(x, weight.image, other.image, x, x, 0, 0, 0, 80)
    with pytest.raises(RuntimeError, match="needs inputs of one dimension or more"):
        step1(torch.ones(()), weight.image, x, 0, 0, 0, 40)
    with pytest.raises(RuntimeError, match="got a bias of another size than its weight's outputs"):
        step1(x, weight.image, torch.ones(39), 1, 0, 0, 40)
    with pytest.raises(RuntimeError, match="takes float32, float16 and bfloat16, and got a tensor of another dtype"):
        step1(x, weight.image, torch.ones(40).double(), 1, 0, 0, 40)
    with pytest.raises(RuntimeError, match="takes float32, float16 and bfloat16, and got a tensor of another dtype"):
        step1(x.long(), weight.image, x, 0, 0, 0, 40)
    with pytest.raises(RuntimeError, match="was traced for weights with other numbers of outputs"):
        step1(x, weight.image, x, 0, 0, 0, 80)
    for image in (weight.image[:-64], weight.image[:5], torch.zeros(5000, dtype=torch.uint8), torch.zeros(0).byte()):
        with pytest.raises(RuntimeError, match="no image of this version of quantc|has no memory"):
            step1(x, image.clone(), x, 0, 0, 0, 40)
    assert step1(x, weight.image, x, 0, 0, 0, 40).shape == (40,)
    assert step1(torch.ones(0, 96), weight.image, x, 0, 0, 0, 40).shape == (0,)
