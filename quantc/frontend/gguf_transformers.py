"""transformers' GGUF support, asked for a model's config and for the names of its tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..errors import ModelError
from .auto import first_line
from .source import is_under, quiet_transformers


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module another value of a name for the context."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class NamesOnly:
    """What transformers' name mapping asks of a model, two levels deep (the model and its base model).

    Given the model itself it descends into every module and builds gguf's table of names anew for each.
    """

    def __init__(self, config: Any, names: list[str], children: list[tuple[str, NamesOnly]]):
        self.config, self._names, self._children = config, names, children

    @classmethod
    def of(cls, model: PreTrainedModel) -> NamesOnly:
        """Return those of a model."""
        names = list(model.state_dict())
        base = model.base_model_prefix
        inner = [name.removeprefix(base + ".") for name in names if is_under(name, base)]
        return cls(model.config, names, [(base, cls(model.config, inner, []))])

    def state_dict(self) -> list[str]:
        """Return the names of all tensors."""
        return self._names

    def named_children(self) -> list[tuple[str, NamesOnly]]:
        """Return the base model, where this is not it."""
        return self._children


def read_config(file: Path) -> Any:
    """Return the config of a GGUF file's model; raises ModelError for an architecture that transformers cannot read."""
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # fields that are missing or of another type end in any kind of exception
        raise ModelError(
            f"{file}: transformers cannot read this architecture from GGUF ({first_line(error)}); "
            "use the model's transformers folder."
        ) from error
