"""The parts of a packed module: compared with the layout however they came there, and looked at again when changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from quantc.checkpoint.config import PackedEntry
from quantc.errors import CheckpointError
from quantc.formats import DENSE, format_of
from quantc.runtime.modules import PackedWeight, QuantLinear
from quantc.spec import QuantSpec
from tests.kernels.weights import SPECS, K, N, filled, stored

DAMAGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda part: part.to(torch.uint8) if part.dtype != torch.uint8 else part.half(),
    lambda part: part[:-1].clone(),
    lambda part: torch.cat([part, part[:1]]),
    lambda part: part.flatten()[None],
    lambda part: part.double(),
    lambda part: part.to_sparse(),
]


def assign(module: QuantLinear, name: str, part: torch.Tensor) -> None:
    setattr(module, name, part)


def load(module: QuantLinear, name: str, part: torch.Tensor) -> None:
    """As from_pretrained does; torch refuses another shape there, but no other dtype."""
    try:
        module.load_state_dict({name: part}, assign=True, strict=False)
    except RuntimeError as error:
        assert "size mismatch" in str(error)
        module._buffers[name] = part


def replace_buffer(module: QuantLinear, name: str, part: torch.Tensor) -> None:
    module._buffers[name] = part


@pytest.mark.parametrize("way", [assign, load, replace_buffer])
@pytest.mark.parametrize("label", SPECS)
def test_parts_of_another_dtype_or_shape_are_named(label: str, way: Callable[..., None]) -> None:
    spec = SPECS[label]
    x = torch.ones(2, K)
    for name, part in format_of(spec).layout(spec, (N, K)).items():
        for change in DAMAGES:
            changed = change(stored(spec)[name])
            if (changed.dtype, changed.shape, changed.layout) == (part.dtype, part.shape, torch.strided):
                continue
            module = filled(spec)
            module(x)
            way(module, name, changed)
            found = f"the part {name} of a weight ({N}, {K}) in {spec.label()} is "
            found += (
                f"{str(changed.dtype)[6:]} {tuple(changed.shape)}, but must be {str(part.dtype)[6:]} {part.shape}; "
            )
            for use in (lambda module=module: module(x), lambda module=module: module.dequantize(torch.float32)):
                with pytest.raises(CheckpointError, match=re.escape(found + "load the checkpoint again.")):
                    use()


def test_parts_that_were_never_loaded_or_are_on_two_devices_are_named() -> None:
    module, x = filled(QuantSpec(4, 32)), torch.ones(1, K)
    module.scales = module.scales.to("meta")
    with pytest.raises(
        CheckpointError, match=r"parts of a weight \(48, 64\) in w4g32 are on .*move them to one device"
    ):
        module(x)
    module.scales = None
    with pytest.raises(CheckpointError, match="the part scales of .* is missing; load the checkpoint again"):
        module(x)
    with pytest.raises(RuntimeError, match="found at least two devices, cpu and meta!"):
        QuantLinear(QuantSpec(4, 32), (N, K), None, torch.float32)(x)


def test_a_table_is_read_within_its_rows_by_whole_numbers() -> None:
    spec = QuantSpec(5, 8)
    table = PackedWeight(torch.empty(N, K, device="meta"), PackedEntry(spec, (N, K), ()))
    for name, part in DENSE.layout(spec, (N, K)).items():
        setattr(table, name, torch.zeros(part.shape, dtype=part.dtype))
    for index in (N, -1, 2**40):
        with pytest.raises(IndexError, match="index out of range in self"):
            F.embedding(torch.tensor([0, index]), table)  # type: ignore[arg-type]
    for strange in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1], dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="an embedding is read by Long or Int indices, but got"):
            F.embedding(strange, table)  # type: ignore[arg-type]
    table.scales = torch.zeros(table.scales.shape, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="the part scales of .* is uint8"):
        F.embedding(torch.tensor([0]), table)  # type: ignore[arg-type]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("label", SPECS)
def test_changed_parts_are_prepared_again(label: str, inference: bool) -> None:
    module, x = filled(SPECS[label]), torch.randn(2, K, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(inference):
        before = module(x).clone()
        for _ in range(2):
            module.qweight.bitwise_xor_(1)  # in place
            assert torch.equal(module(x), fresh(module)(x))
            assert not torch.equal(module(x), before)
            module.qweight = module.qweight ^ 1  # replaced
            assert torch.equal(module(x), before)
        module.scales.mul_(2)
        assert torch.equal(module(x), fresh(module)(x))


def fresh(module: QuantLinear) -> QuantLinear:
    """A module that has seen nothing, on the same parts."""
    twin = QuantLinear(module.spec, module.matrix_shape, module.bias, module.dtype)
    twin.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    return twin


def test_unchanged_parts_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = filled(QuantSpec(4, 32))
    module(torch.ones(2, K))
    monkeypatch.setattr(module, "_prepare", lambda *_: pytest.fail("prepared again"))
    for rows in (1, 2, 5):
        with torch.inference_mode(rows == 2):
            module(torch.ones(rows, K))


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("label", SPECS)
def test_gradients_pass_after_a_call_in_inference_mode(label: str, made_in_inference_mode: bool) -> None:
    """Whatever is kept from the first call, or was loaded in that mode, must not be an inference tensor."""
    with torch.inference_mode(made_in_inference_mode):
        module = filled(SPECS[label])
    with torch.inference_mode():
        first = module(torch.ones(2, K)).clone()
    x = torch.ones(2, K, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert x.grad is not None
    expected = module.dequantize(torch.float64).sum(0).expand(2, K)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y.detach(), first.clone(), rtol=1e-4, atol=1e-4)
