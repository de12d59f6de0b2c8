"""quantc: a post-training quantization compiler for language models.

    import quantc
    report = quantc.quantize("model", bits=4, out="model-w4")
    model = quantc.load("model-w4")

Importing quantc costs milliseconds: torch and transformers are imported by the first call that needs them,
and `AutoModelForCausalLM.from_pretrained` learns of quantc checkpoints when transformers itself is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .runtime.plugin import register_with_others
from .version import __version__

__all__ = ["QuantcError", "__version__", "check", "compare", "evaluate", "export", "load", "pareto", "plan", "quantize"]

_HOMES = dict.fromkeys(("quantize", "pareto", "load", "evaluate", "compare", "check"), ".api") | {
    "QuantcError": ".errors"
}
MODULES = ("export", "plan")  # functions of quantc.api, and modules too

# In a bare checkout or an editable install, passes/, kernels/ and calib_data/ are beside this folder.
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


class _CallableModule(ModuleType):
    """A module that is also the function of its name: quantc.plan(model, avg_bits=3.5)."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return getattr(import_module("quantc.api"), self.__name__.rpartition(".")[2])(*arguments, **settings)


class _Package(ModuleType):
    """The package; when Python puts a module of MODULES into it, that becomes one that can be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MODULES and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_with_others()


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module 'quantc' has no attribute {name!r}")
