"""What quantc adds to methods of transformers' model classes, for packed models; others of a class are as before.

Methods are wrapped in the class: in the model itself they would be references to it, which keep its memory until
Python collects garbage, and which neither copies nor pickles follow.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.integrity import CONFIG, METHOD, demand_quantc
from ..files.untrusted import read_json
from ..files.whole_file import write_whole
from .tables import unpack_tables, would_resize

Method = Callable[..., Any]
Wrapper = Callable[[Method], Method]


def extend(kind: type) -> None:
    """Let packed models of a class resize and replace their tables, be saved, and have a device without parameters.

    Calling it again does nothing.
    """
    if not isinstance(kind.__dict__.get("device"), _OfAnyTensor):
        for name, of_buffers in (("device", _device_of_buffers), ("dtype", _dtype_of_config)):
            setattr(kind, name, _OfAnyTensor(_or_else(getattr(kind, name), of_buffers)))
    for name, wrapper in WRAPPERS.items():
        method = getattr(kind, name)
        if not hasattr(method, "of_quantc"):
            wrapped: Any = wrapper(method)
            wrapped.of_quantc = True
            setattr(kind, name, wrapped)


class _OfAnyTensor(property):
    """A property that transformers reads off the parameters of a model, for those whose weights are all packed too."""


def _or_else(found: property, of_buffers: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def value(model: Any) -> Any:
        return of_buffers(model) if next(model.parameters(), None) is None else found.__get__(model)

    return value


def _device_of_buffers(model: Any) -> torch.device:
    return next((buffer.device for buffer in model.buffers()), torch.device("cpu"))


def _dtype_of_config(model: Any) -> torch.dtype:
    dtype = model.config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _unpacking_where(changes: Method) -> Wrapper:
    """Return a wrapper that unpacks the tables first where `changes`, of the same arguments, says so."""

    def wrapper(method: Method) -> Method:
        @wraps(method)
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            if changes(model, *args, **kwargs):
                unpack_tables(model)
            return method(model, *args, **kwargs)

        return call

    return wrapper


def _demanding_quantc(method: Method) -> Method:
    """Wrap save_pretrained, which leaves out of config.json what makes transformers without quantc refuse it."""

    @wraps(method)
    def call(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        found = method(model, save_directory, *args, **kwargs)
        file = Path(save_directory) / CONFIG
        if getattr(model, "quantization_method", None) == METHOD and file.is_file():
            config = read_json(file)
            demand_quantc(config)
            write_whole(file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        return found

    return call


WRAPPERS: dict[str, Wrapper] = {
    "resize_token_embeddings": _unpacking_where(would_resize),
    "set_input_embeddings": _unpacking_where(lambda model, new: new is not model.get_input_embeddings()),
    "set_output_embeddings": _unpacking_where(lambda model, new: new is not model.get_output_embeddings()),
    "save_pretrained": _demanding_quantc,
}
