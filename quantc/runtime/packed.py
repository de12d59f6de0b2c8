"""The parts of a packed weight in a module, and the kernel that has prepared them."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from ..errors import CheckpointError
from ..formats import Part, Parts, format_of
from ..kernels.base import Kernel, Prepared
from ..kernels.checks import expect_same_device
from ..kernels.registry import choose
from ..spec import QuantSpec

_VERSION = attrgetter("_version")  # autograd counts in it what changes a tensor in place


class _PreparedWeight:
    """A kernel, what it made of a module's parts, and which tensors these were, in which version."""

    __slots__ = ("kernel", "parts", "versions", "weight")

    def __init__(self, kernel: Kernel, weight: Prepared, parts: tuple[torch.Tensor, ...]):
        self.kernel, self.weight, self.parts = kernel, weight, parts
        self.versions = tuple(map(_VERSION, parts))

    def is_of(self, buffers: dict[str, torch.Tensor | None]) -> bool:
        """Return whether a module has the same parts still; takes 0.6 us, which every product pays."""
        return all(map(is_, self.parts, buffers.values())) and tuple(map(_VERSION, self.parts)) == self.versions


class Packed(nn.Module):
    """Packed parts of a weight (*leading, N, K) as buffers, named as in the checkpoint."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], leading: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.spec, self.matrix_shape, self.leading = spec, shape, leading
        self.dtype = dtype  # of the activations the model is built for
        self._parts = format_of(spec).layout(spec, shape, leading)
        for name, part in self._parts.items():
            self.register_buffer(name, torch.empty(part.shape, dtype=part.dtype, device="meta"))
        self._prepared: dict[tuple[int, torch.dtype, torch.device], _PreparedWeight] = {}

    def parts(self, expert: int | None = None) -> Parts:
        """Return the stored parts, of the whole weight or of one expert of a stack.

        Raises CheckpointError for a part that is not as the layout says, however it came here: what reads parts trusts
        their sizes.
        """
        tensors = {name: self._as_laid_out(name, part) for name, part in self._parts.items()}
        devices = {tensor.device for tensor in tensors.values()}
        if len(devices) > 1:
            raise CheckpointError(f"parts of {self._described()} are on {devices}; move them to one device.")
        return tensors if expert is None else {name: tensor[expert] for name, tensor in tensors.items()}

    def _as_laid_out(self, name: str, part: Part) -> torch.Tensor:
        tensor = self._buffers.get(name)
        if tensor is None:
            raise CheckpointError(f"the part {name} of {self._described()} is missing; load the checkpoint again.")
        if (tensor.dtype, tensor.shape, tensor.layout) != (part.dtype, part.shape, torch.strided):
            found = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            raise CheckpointError(
                f"the part {name} of {self._described()} is {found}, but must be {dtype_name(part.dtype)} "
                f"{part.shape}; load the checkpoint again."
            )
        return tensor

    def _described(self) -> str:
        return f"a weight {(*self.leading, *self.matrix_shape)} in {self.spec.label()}"

    def multiply(self, x: torch.Tensor, expert: int | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x (..., K) times W^T + bias (..., N), by the kernel chosen for x's device and dtype.

        Parts that were replaced or changed in place are prepared again; a change through `.data`, which autograd does
        not count either, is not seen. Raises RuntimeError for what nn.Linear does not multiply (kernels/checks.py), and
        CheckpointError as `parts` does.
        """
        key = (-1 if expert is None else expert, x.dtype, x.device)
        found = self._prepared.get(key)
        # What a compiler has captured it guards by itself, and it cannot look into versions.
        if found is None or not (is_compiling() or found.is_of(self._buffers)):
            found = self._prepared[key] = self._prepare(x, expert)
        return found.kernel.run(x, found.weight, bias)

    def prepare(self) -> None:
        """Prepare the whole weight for activations of the model's dtype, which a compiler cannot do while it traces."""
        device = next(self.buffers()).device
        self._prepared[-1, self.dtype, device] = self._prepare(torch.empty(0, dtype=self.dtype, device=device), None)

    @torch.no_grad()
    def _prepare(self, x: torch.Tensor, expert: int | None) -> _PreparedWeight:
        """Return the parts as the kernel for x wants them, usable in every mode: inference tensors cannot train."""
        if not x.is_floating_point():
            found = f"{dtype_name(x.dtype)} and {dtype_name(self.dtype)}"
            raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {found}")
        with torch.inference_mode(False):
            for name, tensor in self._buffers.items():
                if tensor is not None and tensor.is_inference():
                    self._buffers[name] = tensor.clone()
            whole, parts = tuple(self.parts().values()), self.parts(expert)
            expect_same_device(x.device, whole[0].device)
            if any(not known.is_of(self._buffers) for known in self._prepared.values()):
                self._prepared.clear()
            kernel = choose(self.spec, self.matrix_shape, x.device, x.dtype).kernel
            return _PreparedWeight(kernel, kernel.prepare(parts, self.spec, self.matrix_shape, x.dtype), whole)

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """Return the whole weight (or one expert's), unpacked."""
        tensor = format_of(self.spec).unpack(self.parts(expert), self.spec, self.matrix_shape)
        return tensor.effective_weight().to(dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Packed:
        """Move the parts to a device; casting (`model.half()`) leaves the stored dtypes as they are."""
        self._prepared.clear()
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, part in self._parts.items():
            tensor = getattr(self, name)
            moved = fn(tensor)
            setattr(self, name, moved if moved.dtype == part.dtype else tensor.to(moved.device))
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(fn(parameter.data), requires_grad=False)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._prepared.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        n, k = self.matrix_shape
        return f"{k} -> {n}, {self.spec.label()}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return how torch's messages name a dtype: without its module."""
    return str(dtype).removeprefix("torch.")
