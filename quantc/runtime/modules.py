"""Modules that hold packed weights: QuantLinear in place of a linear, PackedWeight in place of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..checkpoint.config import PackedEntry, ResidualRotation
from ..errors import CheckpointError
from ..formats import DENSE, Part, Parts, format_of
from ..kernels.base import Kernel, Prepared
from ..kernels.checks import expect_same_device
from ..kernels.registry import choose
from ..spec import QuantSpec
from .residual_hooks import attach

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


class _Packed(nn.Module):
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
            raise CheckpointError(
                f"the part {name} of {self._described()} is {_name(tensor.dtype)} {tuple(tensor.shape)}, but must be "
                f"{_name(part.dtype)} {part.shape}; load the checkpoint again."
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

    @torch.no_grad()
    def _prepare(self, x: torch.Tensor, expert: int | None) -> _PreparedWeight:
        """Return the parts as the kernel for x wants them, usable in every mode: inference tensors cannot train."""
        if not x.is_floating_point():
            found = f"{_name(x.dtype)} and {_name(self.dtype)}"
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

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Packed:
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


class QuantLinear(_Packed):
    """A linear y = x W^T + b on packed weights; x (..., K), y (..., N) in x's dtype."""

    def __init__(self, spec: QuantSpec, shape: tuple[int, int], bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__(spec, shape, (), dtype)
        self.out_features, self.in_features = shape
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the weight, for code that asks a linear about them; it holds no values."""
        stand_in = torch.empty(self.matrix_shape, dtype=self.dtype, device="meta")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then leaves it alone
        return stand_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters  # nn.Module takes 0.5 us to find one
        if "bias" in parameters:
            return self.multiply(x, None, parameters["bias"])
        return self.multiply(x, None, self.bias)  # where torch's pruning, for one, has put a tensor in its place


class PackedWeight(_Packed):
    """A packed weight in place of a parameter: a stack of experts, or an embedding table.

    The model's own code keeps calling torch functions on it; those that read a weight row by row or multiply with
    it are answered from the packed parts, one expert at a time. Anything else is an error, never a silent copy.
    """

    def __init__(self, parameter: torch.Tensor, entry: PackedEntry):
        super().__init__(entry.spec, entry.shape, entry.leading, parameter.dtype)
        self.shape = torch.Size(entry.model_shape)
        self.transposed = entry.transposed

    def __getitem__(self, expert: int | torch.Tensor) -> ExpertWeight:
        return ExpertWeight(self, int(expert))

    @property
    def device(self) -> torch.device:
        return self.get_buffer("qweight").device

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func is F.embedding and isinstance(args[1], PackedWeight):
            return args[1].rows(args[0])
        if func is F.linear and isinstance(args[1], PackedWeight):
            return args[1].multiply(args[0], bias=_bias_of(args, kwargs))
        if name in ("bmm", "matmul", "__matmul__") and isinstance(args[1], PackedWeight):
            stack = args[1]
            return torch.stack([stack.multiply(x, expert) for expert, x in enumerate(args[0])])
        raise CheckpointError(
            f"the model uses a packed weight in {name}, which works on unpacked weights only; "
            "quantize this model with that weight kept."
        )

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the table's rows for int32 or int64 indices (...): float (..., K), unpacked row by row.

        Raises IndexError for an index that is negative or past the table, as F.embedding does, and RuntimeError for
        indices of another dtype.
        """
        if indices.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"an embedding is read by Long or Int indices, but got {_name(indices.dtype)}")
        if not indices.numel():
            return torch.empty(*indices.shape, self.matrix_shape[1], dtype=self.dtype)
        if is_compiling():  # how many rows differ is no shape that a compiler knows
            return self._unpacked_rows(indices.flatten()).unflatten(0, indices.shape)
        wanted, back = torch.unique(indices, return_inverse=True)
        if int(wanted[0]) < 0 or int(wanted[-1]) >= self.matrix_shape[0]:
            raise IndexError("index out of range in self")
        return self._unpacked_rows(wanted)[back]

    def _unpacked_rows(self, rows: torch.Tensor) -> torch.Tensor:
        shape = (len(rows), self.matrix_shape[1])
        return DENSE.unpack(*self._rows_of(rows), shape).effective_weight().to(self.dtype)

    def _rows_of(self, rows: torch.Tensor) -> tuple[Parts, QuantSpec]:
        """Return parts and spec of the table that has just these rows; a per_ic group then holds a single row."""
        if not self.spec.grid.rowwise:
            raise CheckpointError(
                f"an embedding has the code {self.spec.code}, whose rows cannot be read one by one; quantize the model "
                "with another code for it."
            )
        parts = self.parts()
        if self.spec.grouping == "per_oc":
            return {name: part if name == "low_rank_a" else part[rows] for name, part in parts.items()}, self.spec
        group = rows // self.spec.group_length(self.matrix_shape)
        own = {"qweight": rows, "low_rank_b": rows, "scales": group, "zeros": group}
        cut = {name: part if name == "low_rank_a" else part[own[name]] for name, part in parts.items()}
        return cut, replace(self.spec, group_size=1)


class ExpertWeight:
    """One expert of a stack, in place of the stacked parameter that the model indexes."""

    def __init__(self, stack: PackedWeight, expert: int):
        self.stack, self.expert = stack, expert

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if (func is F.linear or name in ("matmul", "__matmul__", "mm")) and isinstance(args[1], ExpertWeight):
            weight = args[1]
            return weight.stack.multiply(args[0], weight.expert, _bias_of(args, kwargs))
        raise CheckpointError(
            f"the model uses an expert's packed weight in {name}, which works on unpacked weights only; "
            "quantize this model with its experts kept."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bias_of(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> torch.Tensor | None:
    """Return the bias of a call of F.linear; matmul has none."""
    bias: torch.Tensor | None = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    return bias


def install(model: nn.Module, entries: dict[str, PackedEntry], residual: ResidualRotation | None = None) -> nn.Module:
    """Put packed modules, on the meta device, in place of the model's weights; returns the model.

    residual: the rotation of the hidden states that the weights were made for.

    Raises CheckpointError when the model has no such weight or it has another shape.
    """
    for name, entry in entries.items():
        parent_name, _, leaf = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            target = getattr(parent, leaf)
        except AttributeError as error:
            raise CheckpointError(
                f"the checkpoint packs {name}, but {type(model).__name__} has no such weight; config.json does not "
                "belong to these weights, or this transformers builds the model differently."
            ) from error
        if isinstance(target, nn.Module):
            bias = getattr(target, "bias", None)
            _check_shape(name, _linear_shape(target), entry.shape)
            setattr(parent, leaf, QuantLinear(entry.spec, entry.shape, bias, target.get_parameter("weight").dtype))
        else:
            _install_parameter(model, name, target, entry)
    if residual is not None:
        attach(model, residual)
    return model


def unpack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model with float weights of a dtype in place of every packed one; needs the memory of all of them."""
    for name, module in list(model.named_modules()):
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if isinstance(module, QuantLinear):
            setattr(parent, leaf, _dense(module, dtype))
        elif isinstance(module, PackedWeight):
            _unpack_parameter(model, parent, leaf, module, dtype)
    return model


def _dense(module: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    dense.weight = nn.Parameter(module.dequantize(dtype), requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
    return dense


def _unpack_parameter(model: nn.Module, parent: nn.Module, leaf: str, packed: PackedWeight, dtype: torch.dtype) -> None:
    weight = packed.dequantize(dtype)
    parameter = nn.Parameter(weight.transpose(-1, -2) if packed.transposed else weight, requires_grad=False)
    for owner in model.modules():
        if owner is parent or owner.__dict__.get(leaf) is packed:
            owner.__dict__.pop(leaf, None)
            owner._modules.pop(leaf, None)
            owner.register_parameter(leaf, parameter)


def _install_parameter(model: Any, name: str, parameter: torch.Tensor, entry: PackedEntry) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    _check_shape(name, tuple(parameter.shape), entry.model_shape)
    if not entry.leading and format_of(entry.spec) is not DENSE:
        raise CheckpointError(
            f"the checkpoint packs {name} as {format_of(entry.spec).name}, but a table is read row by row, which needs "
            f"{DENSE.name}; quantize it again."
        )
    packed = PackedWeight(parameter, entry)
    del parent._parameters[leaf]
    setattr(parent, leaf, packed)
    if entry.leading:
        # The model's own loop over experts indexes the stack; grouped products would need it unpacked.
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._experts_implementation = "eager"
    _share(model, name, packed)


def _share(model: Any, name: str, packed: PackedWeight) -> None:
    """Let tensors that are tied to `name`, such as the head's, read the same packed table.

    They are set past nn.Module, so that the state dict holds the table once, and transformers is told that there
    is nothing left to tie.
    """
    targets = [target for target, source in model.all_tied_weights_keys.items() if source == name]
    for target in targets:
        owner_name, _, leaf = target.rpartition(".")
        owner = model.get_submodule(owner_name)
        owner._parameters.pop(leaf, None)
        object.__setattr__(owner, leaf, packed)
        del model.all_tied_weights_keys[target]
    if targets:
        model._tied_weights_keys = None


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _check_shape(name: str, found: tuple[int, ...], packed: tuple[int, ...]) -> None:
    if found != packed:
        raise CheckpointError(
            f"the checkpoint packs {name} as {packed}, but config.json describes a weight of {found}; "
            "the two do not belong together."
        )
