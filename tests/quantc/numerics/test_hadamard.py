"""Hadamard matrices by their definition, and the fast rotation against the dense matrix."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantc.numerics import paley
from quantc.numerics.hadamard import (
    base_order,
    block_order,
    hadamard_matrix,
    is_small,
    rotate,
    rotate_back,
    rotation,
    rotation_signs,
    signs,
)

UP_TO = 200
# Multiples of 4 up to 200 that neither Paley construction, nor doubling or products of those, reach.
MISSING = {92, 116, 156, 172, 184, 188}
REACHED = [1, 2, *(order for order in range(4, UP_TO + 1, 4) if order not in MISSING)]
MODEL_WIDTHS = [
    *(288, 576, 640, 768, 896, 1152, 1536, 2048, 3072, 4096, 4864, 5120, 6912, 8192, 8960),
    *(11008, 13824, 14336, 18944),
]
# (width, block): every kind of base (none, Paley I and II, prime powers, a product), one block and several.
CASES = [
    *((1, 1), (7, 1), (2, 2), (32, 32), (96, 32), (512, 512), (12, 12), (36, 12), (56, 28), (104, 52), (72, 36)),
    *((144, 72), (288, 288), (300, 20), (576, 576), (640, 640), (688, 344), (1904, 1904)),
]
HALF_TYPES = [torch.float16, torch.bfloat16]
EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def rotation_slowly(width: int, block: int) -> torch.Tensor:
    """R by its definition."""
    blocks = torch.block_diag(*[hadamard_matrix(block)] * (width // block))
    own = signs(width) if block == block_order(width) else signs(block).repeat(width // block)
    return torch.diag(own) @ blocks / math.sqrt(block)


def fingerprint(matrix: torch.Tensor) -> str:
    """Of the signs, row by row: one byte each, 1 for -1."""
    return hashlib.sha256(bytes((matrix < 0).flatten().tolist())).hexdigest()[:16]


@pytest.mark.parametrize("order", [*REACHED, 344])
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == torch.float64
    assert matrix.shape == (order, order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_the_orders_reached_up_to_200() -> None:
    assert [order for order in range(UP_TO + 1) if base_order(order) is not None] == REACHED


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 50, *sorted(MISSING)])
def test_other_orders_are_refused(order: int) -> None:
    assert base_order(order) is None
    with pytest.raises(ValueError, match=f"order {order} "):
        hadamard_matrix(order)


def test_a_product_of_two_bases_stands_in_for_a_missing_one() -> None:
    assert base_order(1904) == 1904
    assert torch.equal(hadamard_matrix(1904), torch.kron(hadamard_matrix(28), hadamard_matrix(68)))


@pytest.mark.parametrize(
    ("order", "base"), [(1, 1), (2, 1), (4096, 1), (24, 12), (576, 36), (104, 52), (11008, 344), (8960, 140), (88, 44)]
)
def test_base_order_is_the_smallest(order: int, base: int) -> None:
    assert base_order(order) == base


def test_doubled_bases_put_the_base_first() -> None:
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(hadamard_matrix(2), sylvester)
    assert torch.equal(hadamard_matrix(4), torch.kron(sylvester, sylvester))
    assert torch.equal(hadamard_matrix(24), torch.kron(hadamard_matrix(12), sylvester))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (12, "c9c5f02d2e199f81"),  # I, q = 11
        (28, "3dd65c1b22c1e0f6"),  # I, q = 3^3
        (36, "a606a811e5572a95"),  # II, q = 17
        (52, "02c1fb03ec3b9c5f"),  # II, q = 5^2
        (344, "c1ba3da5ab0c0168"),  # I, q = 7^3
    ],
)
def test_matrices_never_change(order: int, expected: str) -> None:
    assert fingerprint(hadamard_matrix(order)) == expected


def test_a_caller_who_writes_into_a_matrix_spoils_no_cache() -> None:
    for order in (12, 16, 24):
        before = hadamard_matrix(order).clone()
        hadamard_matrix(order).zero_()
        assert torch.equal(hadamard_matrix(order), before)


@pytest.mark.parametrize(("p", "e"), [(11, 1), (5, 2), (3, 3), (7, 3), (3, 4)])
def test_the_quadratic_character_is_one(p: int, e: int) -> None:
    """Half of the nonzero elements are squares; each nonzero shift correlates to -1, which only fields give."""
    q = p**e
    character = paley._quadratic_character(p, e)
    assert character.tolist().count(0.0) == 1
    assert character.sum() == 0
    table = character[paley._differences(p, e)]
    expected = q * torch.eye(q, dtype=torch.float64) - 1
    assert torch.equal(table @ table.T, expected)


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_widths_of_real_models_take_one_block(width: int) -> None:
    assert block_order(width) == width


@pytest.mark.parametrize(
    ("width", "block"), [(1, 1), (7, 1), (6, 2), (92, 4), (184, 8), (60, 60), (300, 300), (260, 52), (156, 52)]
)
def test_other_widths_take_their_largest_constructible_divisor(width: int, block: int) -> None:
    assert block_order(width) == block


def test_a_width_below_one_has_no_block() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        block_order(0)


@pytest.mark.parametrize(
    ("width", "expected"),
    [(1, "-"), (576, "-+-+-+-+--+-+--+++++--++"), (300, "-+--++--+--+---+++++-+-+")],
)
def test_signs_are_fixed(width: int, expected: str) -> None:
    drawn = signs(width)
    assert drawn.dtype == torch.float64
    assert drawn.shape == (width,)
    assert "".join("-" if sign < 0 else "+" for sign in drawn.tolist())[:24] == expected


def test_signs_follow_the_written_definition() -> None:
    """As one Python integer: bytes little-endian, so that bit i of the stream is bit i of the number."""
    digests = [hashlib.sha256(b"quantc hadamard 600 %d" % counter).digest() for counter in range(3)]
    stream = int.from_bytes(b"".join(digests), "little")
    assert signs(600).tolist() == [-1.0 if stream >> i & 1 else 1.0 for i in range(600)]


@pytest.mark.parametrize(("width", "block"), CASES)
def test_rotation_equals_the_dense_matrix(width: int, block: int) -> None:
    dense = rotation_slowly(width, block)
    torch.testing.assert_close(rotation(width, block), dense, **EXACT)
    x = draw(3, width)
    torch.testing.assert_close(rotate(x, block), x @ dense, **EXACT)
    torch.testing.assert_close(rotate_back(x, block), x @ dense.T, **EXACT)


@pytest.mark.parametrize(("width", "block"), [(96, 32), (4096, 256), (576, 192)])
def test_one_matrix_rotates_every_block_that_is_smaller_than_the_largest(width: int, block: int) -> None:
    assert is_small(width, block)
    one, x = rotation(block, block), draw(2, width)
    expected = (x.unflatten(1, (-1, block)) @ one).flatten(1)
    torch.testing.assert_close(rotate(x, block), expected, **EXACT)


def test_blocks_of_the_largest_order_have_signs_of_their_own() -> None:
    assert block_order(22 * 67) == 2
    assert not any(is_small(*pair) for pair in ((22 * 67, 2), (576, 576), (96, 0)))
    assert torch.equal(rotation_signs(22 * 67, 2), signs(22 * 67))


@pytest.mark.parametrize(("width", "most", "order"), [(4096, 256, 256), (576, 256, 192), (14336, 256, 256), (7, 4, 1)])
def test_the_largest_block_up_to_a_size(width: int, most: int, order: int) -> None:
    assert block_order(width, most) == order


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from([1, 12, 20, 28, 36, 52, 108]),
    doublings=st.integers(0, 9),
    blocks=st.integers(1, 3),
    rows=st.integers(0, 3),
)
def test_rotating_back_inverts_and_keeps_norms(base: int, doublings: int, blocks: int, rows: int) -> None:
    block = base << doublings
    x = draw(rows, blocks * block)
    turned = rotate(x, block)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(rotate_back(turned, block), x, **EXACT)
    torch.testing.assert_close(rotate(rotate_back(x, block), block), x, **EXACT)


@pytest.mark.parametrize(("width", "block"), [(7, 1), (96, 32), (104, 52), (576, 576)])
def test_products_with_rotated_weights_are_unchanged(width: int, block: int) -> None:
    x, weight = draw(4, width), draw(2, 5, width)[1]
    torch.testing.assert_close(rotate(x, block) @ rotate(weight, block).T, x @ weight.T, **EXACT)


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(576, dtype=torch.float64)
    x[17] = 24
    torch.testing.assert_close(rotate(x, 576).abs(), torch.ones(576, dtype=torch.float64), **EXACT)


def test_float32_stays_float32() -> None:
    x = draw(5, 576)
    for turn in (rotate, rotate_back):
        turned = turn(x.float(), 576)
        assert turned.dtype == torch.float32
        torch.testing.assert_close(turned.double(), turn(x, 576), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = draw(5, 576, dtype=dtype)
    for turn in (rotate, rotate_back):
        turned = turn(x, 576)
        assert turned.dtype == dtype
        assert torch.equal(turned, turn(x.float(), 576).to(dtype))
    assert rotation(12, 12, dtype).dtype == dtype


def test_float16_does_not_overflow_between_factors() -> None:
    x = torch.full((1, 4096), 1000.0, dtype=torch.float16) * signs(4096).half()
    assert rotate(x, 4096)[0, :2].tolist() == [64000.0, 0.0]


def test_autocast_does_not_lower_the_precision() -> None:
    x = draw(5, 576, dtype=torch.float32)
    expected = rotate(x, 576), rotate_back(x, 576)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(x, 576), expected[0])
        assert torch.equal(rotate_back(x, 576), expected[1])


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize(("width", "block"), [(7, 1), (48, 48), (36, 12), (32, 32)])
def test_leading_dimensions_and_empty_batches(leading: tuple[int, ...], width: int, block: int) -> None:
    x = draw(*leading, width)
    for turn in (rotate, rotate_back):
        turned = turn(x, block)
        assert turned.shape == x.shape
        rows = [turn(row, block) for row in x.reshape(math.prod(leading), width)]
        for row, expected in zip(turned.reshape(math.prod(leading), width), rows, strict=True):
            torch.testing.assert_close(row, expected, **EXACT)


@pytest.mark.parametrize(("width", "block"), [(7, 1), (48, 48), (36, 12), (32, 32)])
def test_strided_input_turns_like_contiguous_input(width: int, block: int) -> None:
    for x in (draw(width, 5).T, draw(5, 2 * width)[:, ::2], draw(width).expand(3, width)):
        assert not x.is_contiguous()
        for turn in (rotate, rotate_back):
            torch.testing.assert_close(turn(x, block), turn(x.contiguous(), block), **EXACT)


@pytest.mark.parametrize("block", [1, 12, 16])
def test_the_input_is_left_alone(block: int) -> None:
    x = draw(3, 48)
    before = x.clone()
    for turn in (rotate, rotate_back):
        turn(x, block).zero_()
        assert torch.equal(x, before)


def test_gradients_turn_back_even_after_a_first_call_in_inference_mode() -> None:
    width, block = 144, 72  # a width of its own: nothing is cached for it yet in float32
    with torch.inference_mode():
        rotate(draw(2, width, dtype=torch.float32), block)
    x = draw(2, width, dtype=torch.float32).requires_grad_()
    upstream = draw(2, width, dtype=torch.float32)
    rotate(x, block).backward(upstream)
    torch.testing.assert_close(x.grad, rotate_back(upstream, block))


def test_meta_tensors_keep_their_shape_and_spoil_no_cache() -> None:
    with torch.device("meta"):
        assert rotate(torch.empty(2, 176), 88).shape == (2, 176)
        assert rotate(torch.empty(2, 176, device="cpu"), 88).device.type == "cpu"
    x = draw(2, 176)
    torch.testing.assert_close(rotate(x, 88), x @ rotation_slowly(176, 88), **EXACT)


@pytest.mark.parametrize("turn", [rotate, rotate_back])
def test_what_cannot_be_turned_is_refused(turn: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="36 is not a multiple of block 16"):
        turn(draw(2, 36), 16)
    for block in (0, -4, 3, 92):
        with pytest.raises(ValueError, match=f"order {block} "):
            turn(draw(2, 276), block)
    with pytest.raises(ValueError, match="int64"):
        turn(torch.ones(2, 4, dtype=torch.int64), 4)
