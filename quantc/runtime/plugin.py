"""Tells transformers about quantc without importing transformers.

`import quantc` must be cheap (the command line answers `--help` in milliseconds), yet after it
`AutoModelForCausalLM.from_pretrained` must know the quantization method "quantc". So registration waits for the
module that holds transformers' table of quantizers: if it is loaded already, register now; otherwise a finder
on `sys.meta_path` registers right after that module has been executed, and steps aside.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register the quantizer now, or as soon as transformers' table of quantizers is imported."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _register() -> None:
    from . import hf

    hf.register()


class _TableFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, inner: Loader):
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register()
