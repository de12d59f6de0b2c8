"""Layers on packed weights: QuantLinear in place of a linear, PackedWeight in place of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from ..checkpoint.config import PackedEntry
from ..errors import CheckpointError
from ..formats import DENSE
from ..spec import QuantSpec
from .packed import Packed, dtype_name


class QuantLinear(Packed):
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


class PackedWeight(Packed):
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

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape of the parameter, or one dimension of it, as a tensor does."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def requires_grad(self) -> bool:
        """Codes cannot be trained."""
        return False

    @property
    def data(self) -> torch.Tensor:
        """Raise CheckpointError: there are no floats to read or write."""
        raise CheckpointError(
            "the values of a packed weight are read or written directly, which only float weights allow; call "
            "quantc.runtime.tables.unpack_tables(model) first if it is an embedding or a head."
        )

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
            raise RuntimeError(f"an embedding is read by Long or Int indices, but got {dtype_name(indices.dtype)}")
        if not indices.numel():
            return torch.empty(*indices.shape, self.matrix_shape[1], dtype=self.dtype)
        if is_compiling():  # how many rows differ is no shape that a compiler knows
            return self._unpacked_rows(indices.flatten()).unflatten(0, indices.shape)
        wanted, back = torch.unique(indices, return_inverse=True)
        if int(wanted[0]) < 0 or int(wanted[-1]) >= self.matrix_shape[0]:
            raise IndexError("index out of range in self")
        return self._unpacked_rows(wanted)[back]

    def _unpacked_rows(self, rows: torch.Tensor) -> torch.Tensor:
        tensor = DENSE.unpack_rows(self.parts(), self.spec, self.matrix_shape, rows)
        return tensor.effective_weight().to(self.dtype)


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


def _bias_of(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> torch.Tensor | None:
    """Return the bias of a call of F.linear; matmul has none."""
    bias: torch.Tensor | None = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
    return bias
