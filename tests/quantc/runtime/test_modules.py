"""Packed modules: the same product as the dequantized weight, and stored dtypes that nothing changes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quantc.checkpoint.config import PackedEntry
from quantc.errors import CheckpointError
from quantc.formats import DENSE
from quantc.numerics.qtensor import QTensor
from quantc.runtime.modules import PackedWeight, QuantLinear, install, unpack
from quantc.spec import WHOLE_ROW, Grouping, QuantSpec
from tests.families import build

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECS = [
    QuantSpec(2, 8),
    QuantSpec(3, 16, symmetric=True),
    QuantSpec(4, 32),
    QuantSpec(4, 32, symmetric=True),
    QuantSpec(4, WHOLE_ROW, "per_ic"),
    QuantSpec(5, 10),
    QuantSpec(8, 7, "per_ic", True),
    QuantSpec(4, 32, rank=3),
    QuantSpec(3, 8, "per_ic", rank=2),
]
SHAPES = [(32, 64), (9, 33)]


def random_qtensor(spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    n, k = shape
    groups = (*leading, *spec.scales_shape(shape))

    def codes(size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, spec.levels, size, dtype=torch.uint8, generator=generator)

    def halves(*size: int) -> torch.Tensor:
        return (torch.rand(*size, generator=generator) / spec.levels + 0.01).half()

    return QTensor(
        spec,
        codes((*leading, n, k)),
        halves(*groups),
        None if spec.symmetric else codes(groups),
        halves(*leading, spec.rank, k) if spec.rank else None,
        halves(*leading, n, spec.rank) if spec.rank else None,
    )


def fill(module: QuantLinear | PackedWeight, tensor: QTensor) -> None:
    for name, part in DENSE.pack(tensor).items():
        setattr(module, name, part)


def make_linear(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[QuantLinear, torch.Tensor]:
    """The module, and the float32 weight (N, K) that it stands for."""
    tensor = random_qtensor(spec, shape)
    values = torch.linspace(-1, 1, shape[0]).to(dtype) if bias else None
    module = QuantLinear(spec, shape, values, dtype)
    fill(module, tensor)
    return module, tensor.effective_weight()


def inputs(k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """(..., K) with 1, 2, 17 rows, and more dimensions."""
    whole = torch.randn(17, 2, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [whole[0, :1], whole[0], whole.reshape(-1, k)[:17], whole]


def strided_inputs(k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """(..., K) cut from something wider, and transposed."""
    wide = torch.randn(17, 2, 2 * k, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [wide[..., 1 : k + 1], wide[..., ::2], wide[..., :k].transpose(0, 1), wide[:, 0, :k].T.contiguous().T]


def check_linear(module: QuantLinear, weight: torch.Tensor, x: torch.Tensor) -> None:
    """The module against F.linear in float64; the tolerance is a few roundings of x's dtype."""
    y = module(x)
    bias = None if module.bias is None else module.bias.double()
    expected = F.linear(x.double(), weight.double(), bias)
    size = F.linear(x.double().abs(), weight.double().abs()) + 1
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= 6 * torch.finfo(x.dtype).eps * size).all())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_it_is_a_linear_with_the_dequantized_weight(spec: QuantSpec, dtype: torch.dtype, bias: bool) -> None:
    for shape in SHAPES:
        module, weight = make_linear(spec, shape, dtype, bias)
        for x in inputs(shape[1], dtype):
            check_linear(module, weight, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_strided_activations(spec: QuantSpec, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        module, weight = make_linear(spec, shape, dtype, bias=True)
        for x in strided_inputs(shape[1], dtype):
            assert not x.is_contiguous()
            check_linear(module, weight, x)


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_what_code_asks_a_linear_about(spec: QuantSpec) -> None:
    module, weight = make_linear(spec, (9, 33), torch.bfloat16)
    assert (module.out_features, module.in_features) == (9, 33)
    assert module.weight.shape == (9, 33)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.dequantize(torch.float32), weight)
    assert f"33 -> 9, {spec.label()}" in repr(module)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_casting_keeps_the_stored_parts(spec: QuantSpec, cast: str) -> None:
    module, weight = make_linear(spec, (9, 33), bias=True)
    before = {name: part.clone() for name, part in module.named_buffers()}
    getattr(module, cast)()
    for name, part in module.named_buffers():
        assert part.dtype == before[name].dtype, name
        assert torch.equal(part, before[name]), name
    wanted = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "float": torch.float32}
    assert module.weight.dtype == wanted[cast]
    assert module.bias is not None
    assert module.bias.dtype == wanted[cast]
    assert torch.equal(module.dequantize(torch.float32), weight)


def test_a_cast_model_computes_in_the_new_dtype() -> None:
    module, weight = make_linear(QuantSpec(4, 32), (32, 64), bias=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    float_y = module(x)
    y = module.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), float_y, rtol=0.03, atol=0.1 * float(weight.abs().max()))


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.label)
def test_state_dict_roundtrip(spec: QuantSpec) -> None:
    module, weight = make_linear(spec, (9, 33), bias=True)
    state = module.state_dict()
    assert set(state) == {*DENSE.layout(spec, (9, 33)), "bias"}
    fresh = QuantLinear(spec, (9, 33), torch.zeros(9), torch.float32)
    fresh.load_state_dict(state, assign=True)
    x = torch.randn(2, 33)
    assert torch.equal(fresh.dequantize(torch.float32), weight)
    assert torch.equal(fresh(x), module(x))


def test_a_bias_that_has_become_a_tensor_is_added() -> None:
    module, weight = make_linear(QuantSpec(4, 32), (32, 64), bias=True)
    del module.bias
    module.bias = torch.full((32,), 3.0)  # type: ignore[assignment]
    x = torch.randn(2, 64)
    torch.testing.assert_close(module(x), x @ weight.T + 3)


def test_new_weights_are_seen_after_a_product() -> None:
    """load_state_dict after a forward pass must not leave a kernel with the old weights."""
    module, _ = make_linear(QuantSpec(4, 32), (32, 64), torch.bfloat16)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = module(x)
    state = {name: part.clone() for name, part in module.state_dict().items()}
    state["scales"] = state["scales"] * 2
    module.load_state_dict(state)
    torch.testing.assert_close(module(x), before * 2)


def test_a_deep_copy_stands_on_its_own() -> None:
    module, weight = make_linear(QuantSpec(4, 32), (32, 64))
    twin = copy.deepcopy(module)
    module.scales.zero_()
    assert torch.equal(twin.dequantize(torch.float32), weight)


def test_gradients_are_not_kept() -> None:
    module, _ = make_linear(QuantSpec(4, 32), (32, 64), bias=True)
    assert not any(parameter.requires_grad for parameter in module.parameters())


# Weights that are no linear's


def make_packed(
    spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...] = ()
) -> tuple[PackedWeight, torch.Tensor]:
    tensor = random_qtensor(spec, shape, leading)
    module = PackedWeight(torch.empty(*leading, *shape, device="meta"), PackedEntry(spec, shape, leading))
    fill(module, tensor)
    return module, tensor.effective_weight()


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(5, 8),
        QuantSpec(5, 8, symmetric=True),
        QuantSpec(3, 5, "per_ic"),
        QuantSpec(4, WHOLE_ROW, "per_ic", True),
        QuantSpec(4, 8, rank=2),
        QuantSpec(4, 5, "per_ic", rank=2),
    ],
    ids=QuantSpec.label,
)
@pytest.mark.parametrize("indices", [torch.tensor(3), torch.tensor([[5, 0, 5], [11, 1, 0]])])
def test_an_embedding_reads_rows(indices: torch.Tensor, spec: QuantSpec) -> None:
    table, weight = make_packed(spec, (12, 20))
    found = F.embedding(indices, table)  # type: ignore[arg-type]
    torch.testing.assert_close(found, F.embedding(indices, weight), rtol=1e-5, atol=1e-5)
    if not spec.rank:
        assert torch.equal(found, F.embedding(indices, weight))


@pytest.mark.parametrize("grouping", ["per_oc", "per_ic"])
def test_an_embedding_of_no_tokens_has_no_rows(grouping: Grouping) -> None:
    table, _ = make_packed(QuantSpec(5, 8, grouping), (12, 20))
    assert F.embedding(torch.zeros(0, 2).long(), table).shape == (0, 2, 20)  # type: ignore[arg-type]


def test_a_tied_head_multiplies_with_the_table() -> None:
    table, weight = make_packed(QuantSpec(5, 8), (12, 20))
    x = torch.randn(3, 20)
    torch.testing.assert_close(F.linear(x, table), x @ weight.T)  # type: ignore[arg-type]
    bias = torch.randn(12)
    torch.testing.assert_close(F.linear(x, table, bias), x @ weight.T + bias)  # type: ignore[arg-type]
    torch.testing.assert_close(F.linear(x, table, bias=bias), x @ weight.T + bias)  # type: ignore[arg-type]


def test_experts_multiply_one_by_one() -> None:
    stack, weight = make_packed(QuantSpec(4, 8), (12, 20), (3,))
    x = torch.randn(3, 5, 20)
    for expert in range(3):
        torch.testing.assert_close(F.linear(x[0], stack[expert]), x[0] @ weight[expert].T)  # type: ignore[arg-type]
    for index in (torch.tensor(2), torch.tensor([2])[0]):
        torch.testing.assert_close(F.linear(x[0], stack[index]), x[0] @ weight[2].T)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.bmm(x, stack), x @ weight.mT)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [torch.relu, torch.sum, torch.nn.functional.softmax])
def test_a_function_that_needs_the_unpacked_weight_is_refused(function: object) -> None:
    name = function.__name__  # type: ignore[attr-defined]
    table, _ = make_packed(QuantSpec(4, 8), (12, 20))
    with pytest.raises(CheckpointError) as caught:
        function(table)  # type: ignore[operator]
    assert str(caught.value) == (
        f"the model uses a packed weight in {name}, which works on unpacked weights only; "
        "quantize this model with that weight kept."
    )


def test_a_function_of_one_expert_is_refused() -> None:
    stack, _ = make_packed(QuantSpec(4, 8), (12, 20), (3,))
    with pytest.raises(CheckpointError, match="uses an expert's packed weight in relu, which works on unpacked"):
        torch.relu(stack[1])  # type: ignore[arg-type]


# Installing


def test_a_weight_the_model_lacks_is_named() -> None:
    message = "the checkpoint packs model.layers.7.up_proj, but LlamaForCausalLM has no such weight"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        install(build("llama"), {"model.layers.7.up_proj": PackedEntry(QuantSpec(), (4, 4))})


def test_a_weight_of_another_shape_is_named() -> None:
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(CheckpointError) as caught:
        install(build("llama"), {name: PackedEntry(QuantSpec(), (64, 104))})
    assert str(caught.value) == (
        f"the checkpoint packs {name} as (64, 104), but config.json describes a weight of (104, 64); "
        "the two do not belong together."
    )


def test_unpack_puts_float_linears_back() -> None:
    module, weight = make_linear(QuantSpec(4, 32), (32, 64), bias=True)
    model = unpack(nn.Sequential(module, nn.ReLU()), torch.float16)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, weight.half())
    assert torch.equal(model[0].bias, torch.linspace(-1, 1, 32).half())
