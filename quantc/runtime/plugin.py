"""Tells transformers and peft about quantc without importing them.

`import quantc` must be cheap (the command line answers `--help` in milliseconds), yet after it
`AutoModelForCausalLM.from_pretrained` must know the quantization method "quantc", and `get_peft_model` its linears. So
registration waits for the module that holds the other library's table: if it is loaded already, register now;
otherwise a finder on `sys.meta_path` registers right after that module has been executed, and steps aside.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# The modules of others that hold a table, and our function that adds to it.
TABLES = {
    "transformers.quantizers.auto": (".hf", "register"),
    "peft.tuners.lora.config": (".adapters", "register_lora"),
    "peft.tuners.tuners_utils": (".adapters", "register_targets"),
}


def register_with_others() -> None:
    """Register with each library now, or as soon as its table is imported."""
    for table in TABLES:
        if is_loaded(table):
            _register(table)
        elif not any(isinstance(finder, _TableFinder) and finder.table == table for finder in sys.meta_path):
            sys.meta_path.insert(0, _TableFinder(table))


def is_loaded(name: str) -> bool:
    """Return whether a module has been imported, and is not being so just now."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _register(table: str) -> None:
    """Register; whoever imports the other library, maybe for models of others, must not fail because we do."""
    try:
        module, function = TABLES[table]
        getattr(import_module(module, __package__), function)()
    except Exception as error:
        library = table.partition(".")[0]
        warnings.warn(f"quantc does not fit this version of {library}, which will not know it: {error}", stacklevel=2)


class _TableFinder(MetaPathFinder):
    def __init__(self, table: str):
        self.table = table

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.table:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, fullname)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, inner: Loader, table: str):
        self._inner, self._table = inner, table

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register(self._table)
