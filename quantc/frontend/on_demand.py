"""An embedding table whose rows are read when tokens look them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

Rows = Callable[[torch.Tensor], torch.Tensor]


class OnDemand(torch.Tensor):
    """A table (V, K), float32, that holds no values: an embedding reads the rows that it looks up.

    Whatever else is done with it works on the whole table, which then stays in memory.
    """

    content: _Content

    @classmethod
    def of(cls, shape: tuple[int, ...], rows: Rows, whole: Callable[[], torch.Tensor]) -> OnDemand:
        """Return a table. rows: reads rows (R, K) by their sorted numbers (R,). whole: reads all of it."""
        return cls._of(shape, _Content(rows, whole))

    @classmethod
    def _of(cls, shape: tuple[int, ...], content: _Content) -> OnDemand:
        table: OnDemand = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        table.content = content
        return table

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        table = args[0] if args else None
        if isinstance(table, OnDemand):
            if func is torch.ops.aten.embedding.default:
                return table.content.look_up(args[1])
            if func is torch.ops.aten.detach.default:
                return cls._of(tuple(table.shape), table.content)
            if torch.device(kwargs.get("device") or "cpu").type == "meta":
                return torch.empty(table.shape, dtype=kwargs.get("dtype") or table.dtype, device="meta")
        args, kwargs = tree_map_only(OnDemand, lambda each: each.content.whole(), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDemand{tuple(self.shape)}"


class _Content:
    """The values of a table, once they have been read whole, and how they are read."""

    def __init__(self, rows: Rows, whole: Callable[[], torch.Tensor]):
        self._rows, self._read_whole = rows, whole
        self._whole: torch.Tensor | None = None

    def whole(self) -> torch.Tensor:
        """Return all values."""
        if self._whole is None:
            self._whole = self._read_whole()
        return self._whole

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the rows of indices (...), float32 (..., K)."""
        if self._whole is not None:
            return torch.nn.functional.embedding(indices, self._whole)
        wanted, back = torch.unique(indices, return_inverse=True)
        return self._rows(wanted)[back]
