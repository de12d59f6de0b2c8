"""Dropped groups: exact parts for any sparsity, shape and distribution over the rows, and the product of the weight."""

from __future__ import annotations

import pytest
import torch

from quantc.errors import CheckpointError
from quantc.formats import DENSE, FORMATS, GROUP_SPARSE, format_of
from quantc.kernels.base import DENSE_ONLY
from quantc.kernels.cpu import library
from quantc.kernels.cpu.torch_int4 import TORCH_INT4
from quantc.kernels.reference import REFERENCE
from quantc.kernels.registry import KERNELS, choose
from quantc.numerics.groups import spread_groups
from quantc.numerics.qtensor import QTensor
from quantc.spec import SPARSE_GROUPS, QuantSpec, packed_bytes

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 13), (16, 32), (9, 70), (5, 257)]
LEADING = [(), (3,), (2, 2)]
SPARSITIES = [0.01, 0.3, 0.5, 0.8, 1.0]
SPECS = [
    QuantSpec(bits, group, symmetric=symmetric, rank=rank, sparsity=sparsity)
    for bits, group, rank in ((2, 8, 0), (3, 32, 2), (4, 16, 0), (5, 16, 1), (7, 8, 0), (8, 32, 0))
    for symmetric in (False, True)
    for sparsity in SPARSITIES
]


def random_kept(spec: QuantSpec, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """bool (N, G): as many groups as the spec says; some rows are empty and some full where the others allow it."""
    rows, columns = spec.scales_shape(shape)
    scores = torch.rand(rows, columns, generator=generator)
    scores[0] += 1
    scores[-1] -= 1
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[scores.flatten().argsort(descending=True)[: spec.kept_groups(shape)]] = True
    return kept.view(rows, columns)


def random_qtensor(spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = (), seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    groups = spec.scales_shape(shape)
    count = torch.Size(leading).numel()
    kept = torch.stack([random_kept(spec, shape, generator) for _ in range(count)]).reshape(*leading, *groups)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, spec.levels, (*leading, *size), dtype=torch.uint8, generator=generator)

    def halves(*size: int) -> torch.Tensor:
        return torch.randn(*leading, *size, generator=generator).half()

    return QTensor(
        spec,
        codes(*shape).masked_fill(~spread_groups(kept, spec.groups, shape), spec.mid if spec.symmetric else 0),
        halves(*groups).masked_fill(~kept, 1),
        None if spec.symmetric else codes(*groups).masked_fill(~kept, 0),
        halves(spec.rank, shape[1]) if spec.rank else None,
        halves(shape[0], spec.rank) if spec.rank else None,
        kept=kept,
    )


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_pack_follows_the_layout_and_unpacks_exactly(spec: QuantSpec, leading: tuple[int, ...]) -> None:
    for shape in SHAPES:
        tensor = random_qtensor(spec, shape, leading)
        parts = GROUP_SPARSE.pack(tensor)
        layout = GROUP_SPARSE.layout(spec, shape, leading)
        assert list(parts) == list(layout)
        assert all((parts[name].dtype, parts[name].shape) == (part.dtype, part.shape) for name, part in layout.items())
        again = GROUP_SPARSE.unpack(parts, spec, shape)
        for field in ("codes", "scales", "zeros", "low_rank_a", "low_rank_b", "kept"):
            before, after = getattr(tensor, field), getattr(again, field)
            assert (before is None and after is None) or torch.equal(before, after), (spec, field)
        assert not again.dequantize()[~spread_groups(again.kept, spec.groups, shape)].any()


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_stored_bits_are_the_bytes_of_the_packed_parts(spec: QuantSpec) -> None:
    for shape in SHAPES:
        stored = sum(part.nbytes for part in GROUP_SPARSE.pack(random_qtensor(spec, shape)).values())
        assert spec.stored_bits(shape) == 8 * stored
        assert spec.bits_per_weight(shape) == 8 * stored / (shape[0] * shape[1])


def test_the_bits_of_a_usual_sparsity() -> None:
    """Half of (4 bits a code, 16 + 4 a group of 16), and a bit a group."""
    assert QuantSpec(4, 16, sparsity=0.5).bits_per_weight((512, 512)) == (4 + 20 / 16) / 2 + 1 / 16


def test_the_format_with_all_groups_kept() -> None:
    spec, shape = QuantSpec(4, 16), (9, 70)
    full = random_qtensor(spec, shape)
    dense = QTensor(spec, full.codes, full.scales, full.zeros)
    again = GROUP_SPARSE.unpack(GROUP_SPARSE.pack(full), spec, shape)
    assert torch.equal(again.dequantize(), dense.dequantize())
    assert again.kept is not None
    assert bool(again.kept.all())


def test_the_format_follows_from_the_spec() -> None:
    assert format_of(QuantSpec(4, 16)) is DENSE
    assert format_of(QuantSpec(4, 16, sparsity=0.5)) is GROUP_SPARSE is FORMATS["group-sparse"]


def test_the_bytes_of_one_small_weight() -> None:
    """Worked out by hand from the format page: 4 bits, groups of 8 of which the second of a row is shorter."""
    spec, shape = QuantSpec(4, 8, sparsity=0.5), (2, 10)
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 10, 11]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 1.0], [1.0, 2.0]], dtype=torch.float16)
    zeros = torch.tensor([[3, 0], [0, 9]], dtype=torch.uint8)
    kept = torch.tensor([[True, False], [False, True]])
    parts = GROUP_SPARSE.pack(QTensor(spec, codes, scales, zeros, kept=kept))
    assert parts["kept"].tolist() == [[0b01], [0b10]]
    assert parts["qweight"].tolist() == [[0x21, 0x43, 0x65, 0x87], [0xBA, 0, 0, 0]]
    assert parts["scales"].tolist() == [0.5, 2.0]
    assert parts["zeros"].tolist() == [0x93]
    assert GROUP_SPARSE.unpack(parts, spec, shape).dequantize().tolist() == [
        [-1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 2, 4],
    ]


def test_an_index_that_contradicts_the_spec_is_refused() -> None:
    spec, shape = QuantSpec(3, 8, sparsity=0.5), (16, 24)
    parts = GROUP_SPARSE.pack(random_qtensor(spec, shape))
    parts["kept"][0, 0] ^= 1
    with pytest.raises(CheckpointError, match=r"index of a weight \(16, 24\) marks 2[35] groups .* its spec says 24"):
        GROUP_SPARSE.unpack(parts, spec, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hadamard", [0, 32])
def test_the_product_is_that_of_the_unpacked_weight(dtype: torch.dtype, hadamard: int) -> None:
    for sparsity in SPARSITIES:
        spec, shape = QuantSpec(4, 16, hadamard=hadamard, sparsity=sparsity), (33, 96)
        tensor = random_qtensor(spec, shape)
        parts = GROUP_SPARSE.pack(tensor)
        for rows in ((1,), (2, 3), (0,)):
            x = torch.randn(*rows, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
            y = REFERENCE.run(x, REFERENCE.prepare(parts, spec, shape, dtype))
            dense = QTensor(QuantSpec(4, 16, hadamard=hadamard), tensor.codes, tensor.scales, tensor.zeros)
            prepared = REFERENCE.prepare(DENSE.pack(dense), dense.spec, shape, dtype)
            assert torch.equal(y, REFERENCE.run(x, prepared))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_dense_weights_say_why_they_refuse(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "was not built")
    choice = choose(QuantSpec(4, 32, sparsity=0.5), (64, 128), CPU, dtype)
    assert choice.kernel is REFERENCE
    assert set(choice.refused) == {kernel.name for kernel in KERNELS} - {"reference"}
    assert choice.refused["native"] == "was not built"
    assert TORCH_INT4.supports(QuantSpec(4, 32, sparsity=0.5), (64, 128), CPU, torch.bfloat16) == DENSE_ONLY


def test_groups_of_every_size_and_a_row_of_one_group() -> None:
    for group in SPARSE_GROUPS:
        spec = QuantSpec(3, group, sparsity=0.5)
        assert spec.kept_groups((4, 5)) == 2
        assert GROUP_SPARSE.layout(spec, (4, 5))["qweight"].shape == (2, packed_bytes(5, 3))
