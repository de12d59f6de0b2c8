"""Where tensors inside a block came from, and which functions hand that on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Where a tensor came from. `kind` is "norm", "linear", or an activation kind; the rest as in Activation."""

    kind: str
    writers: tuple[str, ...] = ()
    scaled_by: tuple[str, ...] = ()
    head_dim: int = 0


RESIDUAL = Origin("residual")

# Functions that hand values on unchanged, only shaped, cut or cast.
SHAPING = {
    "view", "reshape", "transpose", "permute", "contiguous", "to", "float", "type", "type_as", "flatten", "unflatten",
    "squeeze", "unsqueeze", "expand", "expand_as", "clone", "dropout", "__getitem__", "chunk", "split", "unbind",
    "repeat_interleave", "swapaxes", "movedim", "view_as", "half", "bfloat16", "tensor_split", "narrow", "detach",
}  # fmt: skip
# Functions of one tensor, value by value (softmax: row by row), as activations and gates are.
POINTWISE = {
    "silu", "gelu", "relu", "relu_", "relu6", "leaky_relu", "sigmoid", "tanh", "softplus", "hardswish", "hardsigmoid",
    "mish", "elu", "square", "pow", "exp", "softmax", "log_softmax", "clamp", "clamp_", "clip", "clip_", "sigmoid_",
    "silu_", "__pow__",
}  # fmt: skip
PRODUCTS = {"mul", "__mul__", "mul_", "__rmul__", "multiply", "__imul__"}
SUMS = {"add", "__add__", "add_", "__radd__", "__iadd__", "sub", "__sub__"}


def origin_of_result(name: str, origins: list[Origin]) -> Origin | None:
    """Return where what a function put out came from, by where its tensors did; None where it hands nothing on."""
    if name in SHAPING:
        return origins[0]
    if name in POINTWISE:
        return Origin("activated", origins[0].writers)
    if name in PRODUCTS:
        return _origin_of_product(origins) if len(origins) == 2 else origins[0]  # times a number
    return RESIDUAL if adds_to_residual(name, origins) else None


def adds_to_residual(name: str, origins: list[Origin]) -> bool:
    """Return whether a function adds something to the residual stream."""
    return name in SUMS and len(origins) == 2 and RESIDUAL in origins


def _origin_of_product(origins: list[Origin]) -> Origin | None:
    writers = tuple(dict.fromkeys(writer for origin in origins for writer in origin.writers))
    activated = [origin for origin in origins if origin.kind == "activated"]
    if not activated or not all(origin.writers for origin in origins):
        return None
    plain = {writer for origin in origins if origin.kind == "linear" for writer in origin.writers}
    return Origin("gated", writers, tuple(sorted(plain - set(activated[0].writers))))
