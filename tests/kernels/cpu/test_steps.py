"""Operators of compiled graphs: the products of a direct call, one behind the other."""

from __future__ import annotations

import re

import pytest
import torch

from quantc.kernels.cpu import library, steps
from quantc.kernels.cpu.native import NATIVE
from quantc.kernels.cpu.trellis import NATIVE_TRELLIS
from quantc.spec import QuantSpec

from .cases import DTYPES, built, prepare, random_trellis, random_weight, trellis

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hadamard", [0, 96])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_of_trellis_codes_is_the_direct_calls(dtype: torch.dtype, hadamard: int, rows: int) -> None:
    sizes, widths = (40, 17, 96, 160), (3, 1, 5, 2)
    weights = [random_trellis(trellis(bits, hadamard), (n, 96))[0] for n, bits in zip(sizes, widths, strict=True)]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 1, 96, generator=generator).to(dtype)
    biases = [torch.randn(n, generator=generator).to(kind) for n, kind in zip(sizes, [*DTYPES, dtype], strict=True)]
    for count, name in enumerate(steps.TRELLIS_NAMES, 1):
        tensors = [w.codes for w in weights[:count]] + [w.scales for w in weights[:count]]
        bits = sum(width << 4 * place for place, width in enumerate(widths[:count]))
        for biased in (0, 1, 2**count - 1):
            given = [bias if biased >> i & 1 else x for i, bias in enumerate(biases[:count])]
            step = getattr(torch.ops.quantc, name)
            y = step(x, *tensors, *given, biased, hadamard, bits, 0, sum(sizes[:count]))
            for i, part in enumerate(y.split([rows * n for n in sizes[:count]])):
                expected = NATIVE_TRELLIS.run(x, weights[i], biases[i] if biased >> i & 1 else None)
                assert torch.equal(part.view(expected.shape), expected)


def test_a_step_of_trellis_codes_rounds_a_row_to_int8_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.loaded().has_int8():
        return
    monkeypatch.setattr(NATIVE_TRELLIS, "int8", True)
    weight, x = random_trellis(trellis(3), (96, 96))[0], torch.randn(1, 96)
    y = torch.ops.quantc.trellis_step1(x, weight.codes, weight.scales, x, 0, 0, 3, 1, 96)
    assert torch.equal(y.view(1, 96), NATIVE_TRELLIS.run(x, weight))


def test_codes_that_are_not_those_of_a_trellis_weight_are_an_error() -> None:
    weight, step = random_trellis(trellis(3), (96, 40))[0], torch.ops.quantc.trellis_step1
    x, codes, scales = torch.ones(1, 40), weight.codes, weight.scales
    for found in [(codes, scales[:95]), (codes, scales.float()), (codes[..., :-1], scales)]:
        with pytest.raises(RuntimeError, match="not those of one weight"):
            step(x, *(part.contiguous() for part in found), x, 0, 0, 3, 0, 96)
    for bits in (0, 2, 6):
        with pytest.raises(RuntimeError, match="not those of one weight"):
            step(x, codes, scales, x, 0, 0, bits, 0, 96)
    with pytest.raises(RuntimeError, match="got a weight of too few dimensions"):
        step(x, codes.flatten(), scales, x, 0, 0, 3, 0, 96)
    with pytest.raises(RuntimeError, match=re.escape("mat1 and mat2 shapes cannot be multiplied (1x41 and 40x96)")):
        step(torch.ones(1, 41), codes, scales, x, 0, 0, 3, 0, 96)
    with pytest.raises(RuntimeError, match="was traced for weights with other numbers of outputs"):
        step(x, codes, scales, x, 0, 0, 3, 0, 95)
    assert step(x, codes, scales, x, 0, 0, 3, 0, 96).shape == (96,)


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
