"""Watches one block run: which tensor each linear receives, and what that tensor was computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .blocks import BlockCall, Returns
from .model_graph import Activation, ActivationKind, Block, Linear, LinearKind, Norm
from .modules import StackTable, as_norm, linear_modules, loose_weights, shape_of
from .origins import RESIDUAL, Origin, adds_to_residual, origin_of_result

TensorKey = tuple[int, int, int, int]

ROUTES = "it routes tokens to experts"
CHOICES = {"topk", "argmax", "sort", "max"}
MATRIX_PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "__rmatmul__", "mm"}
QUESTIONS = {"__get__", "size", "dim", "numel", "is_contiguous", "stride", "data_ptr", "__len__", "element_size"}


class BlockTracer(TorchFunctionMode):
    """Runs one block under observation. Names in what it yields are relative to the block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.module = block
        self.modules: dict[str, tuple[nn.Module, LinearKind]] = dict(linear_modules(block))
        self.weights = {id(module.weight): name for name, (module, _) in self.modules.items()}
        self.stacks = StackTable(block)
        self.loose = {p.data_ptr(): name for name, p in loose_weights(block, self.modules)}
        self.loose_uses: dict[str, tuple[int, ...]] = {}  # those that multiplied something -> (N, K)
        self.inputs: dict[str, TensorKey] = {}  # linear -> the tensor it received
        self.stack_uses: dict[str, bool] = {}  # stack -> whether it is stored as (E, K, N)
        self.input_origin: dict[TensorKey, Origin] = {}
        self.norms: dict[str, Norm] = {}
        self.borrowed: set[str] = set()  # linears whose weight was used outside their forward
        self.choosers: set[str] = set()  # linears whose output a top-k choice is made from
        self.added: list[str] = []  # writers of the residual stream
        self._origins: dict[int, Origin] = {}
        self._alive: list[Any] = []  # keeps ids and addresses from being used twice
        self._inside: list[str] = []  # linears whose forward is running
        self._left: set[str] = set()  # linears whose forward has run
        self._paused = False

    def run(self, call: BlockCall) -> Any:
        """Run the block on a call and record what it does; return its output."""
        self._remember(call.hidden, RESIDUAL)
        hooks = list(self._hooks())
        try:
            with torch.no_grad(), self:
                return call.run(self.module)
        finally:
            for hook in hooks:
                hook.remove()

    def block(self, returns: Returns) -> Block:
        """Return what was seen, as a Block of index 0 and no name."""
        labels = self._labels()
        linears = [
            Linear(
                name, kind, shape_of(module), labels[name],
                transposed=kind == "conv1d", keep=self._reason_to_keep(name, module),
            )
            for name, (module, kind) in self.modules.items()
        ]  # fmt: skip
        linears += [self._stack(name, transposed, labels[name]) for name, transposed in self.stack_uses.items()]
        linears += [
            Linear(name, "linear", (n, k), labels[name], keep=ROUTES if name in self.choosers else "no linear holds it")
            for name, (n, k) in self.loose_uses.items()
        ]
        readers: dict[str, list[Linear]] = {}
        for linear in linears:
            readers.setdefault(linear.reads, []).append(linear)
        return Block(
            index=0,
            name="",
            linears=tuple(linears),
            norms=tuple(self.norms.values()),
            activations=tuple(self._activation(label, found) for label, found in readers.items()),
            residual_writers=tuple(dict.fromkeys(self.added)),
            returns=returns,
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._paused:
            self._observe(getattr(func, "__name__", ""), func, args, kwargs, output)
        return output

    def _observe(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._notice_borrowing(name, args)
        if name in MATRIX_PRODUCTS and len(args) >= 2:
            self._notice_stack(name, args)
        if name == "linear" and len(args) >= 2 and isinstance(args[1], torch.Tensor):
            self._notice_loose(args, output)
        if name in CHOICES and args:
            self.choosers.update(self._origin(args[0]).writers)
        origin = self._origin_of_result(name, func, args, kwargs)
        if origin is None and name.endswith("_") and not name.endswith("__"):
            origin = Origin("other")  # changed in place: no longer what it was
        if origin is not None:
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                self._remember(tensor, origin)

    def _origin_of_result(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin | None:
        if func is F.scaled_dot_product_attention:
            value = args[2] if len(args) > 2 else kwargs["value"]
            source = self._origin(value)
            return Origin("value", source.writers, source.writers if source.kind == "linear" else (), value.shape[-1])
        origins = [self._origin(value) for value in args if isinstance(value, torch.Tensor)]
        if not origins:
            return None
        if adds_to_residual(name, origins):
            self.added += [writer for origin in origins if origin.kind != "residual" for writer in origin.writers]
        return origin_of_result(name, origins)

    def _notice_borrowing(self, name: str, args: tuple[Any, ...]) -> None:
        if name in QUESTIONS:
            return
        for value in args:
            owner = self.weights.get(id(value)) if isinstance(value, nn.Parameter) else None
            if owner is not None and owner not in self._inside:
                self.borrowed.add(owner)

    def _notice_stack(self, name: str, args: tuple[Any, ...]) -> None:
        found = self.stacks.find(args[1])
        if found is None:
            return
        self.stack_uses[found.name] = name != "linear"
        self._record_input(found.name, args[0])

    def _notice_loose(self, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Record a product with a weight that no linear module holds, as many routers have."""
        name = self.loose.get(args[1].data_ptr())
        if name is not None and args[1].ndim == 2:
            self.loose_uses[name] = tuple(args[1].shape)
            self._record_input(name, args[0])
            self._remember(output, Origin("linear", (name,)))

    def _record_input(self, linear: str, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        self.inputs.setdefault(linear, key)
        self.input_origin.setdefault(key, self._origin(tensor))
        self._alive.append(tensor)

    def _hooks(self) -> Any:
        for name, (module, _) in self.modules.items():
            yield module.register_forward_pre_hook(lambda _, args, name=name: self._enter(name, args))
            yield module.register_forward_hook(lambda _, __, output, name=name: self._leave(name, output))
        for name, module in self.module.named_modules():
            if name and name not in self.modules and not any(True for _ in module.children()):
                yield module.register_forward_hook(
                    lambda module, args, output, name=name: self._notice_norm(name, module, args, output)
                )

    def _enter(self, name: str, args: tuple[Any, ...]) -> None:
        self._inside.append(name)
        self._record_input(name, args[0])

    def _leave(self, name: str, output: torch.Tensor) -> None:
        self._inside.pop()
        # What comes out at a second call depends on what ran between the calls: no writer of its own.
        self._remember(output, Origin("other") if name in self._left else Origin("linear", (name,)))
        self._left.add(name)

    def _notice_norm(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(output, torch.Tensor) or not isinstance(args[0], torch.Tensor):
            return
        if output.shape != args[0].shape or len(args) > 1:
            return
        self._paused = True
        try:
            norm = as_norm(name, module, args[0])
        finally:
            self._paused = False
        if norm is not None:
            behind = self._origin(args[0])
            self.norms[name] = replace(norm, of_residual=behind.kind == "residual")
            self._remember(output, Origin("norm", (name, *(w for w in behind.writers if w in self.modules))))

    def _remember(self, tensor: Any, origin: Origin) -> None:
        if isinstance(tensor, torch.Tensor):
            self._origins[id(tensor)] = origin
            self._alive.append(tensor)

    def _origin(self, tensor: Any) -> Origin:
        return self._origins.get(id(tensor), Origin("other"))

    def _labels(self) -> dict[str, str]:
        """Return linear -> label of the activation it reads: the first reader's name, with ":in"."""
        first: dict[TensorKey, str] = {}
        labels = {}
        for name in [*self.modules, *self.stack_uses, *self.loose_uses]:
            key = self.inputs.get(name)
            labels[name] = f"{name if key is None else first.setdefault(key, name)}:in"
        return labels

    def _reason_to_keep(self, name: str, module: nn.Module) -> str:
        if name in self.borrowed:
            return "its weight is used outside its forward"
        if name in self.choosers:
            return ROUTES
        if shape_of(module)[0] == 1:
            return "it has a single output"
        return ""

    def _stack(self, name: str, transposed: bool, label: str) -> Linear:
        experts, rows, columns = self.stacks.parameters[name].shape
        shape = (columns, rows) if transposed else (rows, columns)
        return Linear(name, "stack", shape, label, experts=experts, transposed=transposed)

    def _activation(self, label: str, readers: list[Linear]) -> Activation:
        key = self.inputs.get(readers[0].name)
        origin = self.input_origin.get(key, Origin("other")) if key is not None else Origin("other")
        kinds: dict[str, ActivationKind] = {"norm": "normed", "linear": "other", "residual": "residual"}
        kinds |= {"value": "value", "gated": "gated", "activated": "activated"}
        kind = "rows" if readers[0].kind == "stack" else kinds.get(origin.kind, "other")
        writers = origin.writers[:1] if origin.kind == "norm" else origin.writers
        order = -1 if key is None else list(self.input_origin).index(key)
        names = tuple(item.name for item in readers)
        return Activation(label, kind, readers[0].shape[1], writers, names, order, origin.scaled_by, origin.head_dim)


def _key(tensor: torch.Tensor) -> TensorKey:
    """Return a key that is equal for views of the same values: address, count, last dimension and version."""
    return tensor.data_ptr(), tensor.numel(), tensor.shape[-1], tensor._version
