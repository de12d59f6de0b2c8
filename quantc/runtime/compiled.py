"""Compiled decoding on the CPU: transformers' static cache, torch.compile, and two rewrites of the graph before it.

Prompts run as they are, in any length; the graph is that of one token for each text. step_graph.py rewrites it.

Guards on the model's modules, which are most of what is checked before every token, give way to one look at them before
every text.

Compiling takes most of a minute, and what it makes is kept in torch's cache (TORCHINDUCTOR_CACHE_DIR), where the next
process finds it: everything in the graph must be something that torch knows how to cache.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import shutil
import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import fx
from transformers import CompileConfig, PreTrainedModel

from ..errors import UsageError
from ..kernels.cpu import steps
from ..progress import LogProgress, Progress
from .step_graph import attend, join_products, open_attention

# Loops below this are left to one thread: a token's are of some thousand values, and waking another that sleeps takes
# longer (15 % of a token with OMP_WAIT_POLICY=PASSIVE).
# The sine and cosine of a rotary embedding would be computed anew in every layer, for every cached position: the
# compiler repeats what takes up to 50 operations where it is read.
OPTIONS = {"cpp.min_chunk_size": 1 << 16, "realize_opcount_threshold": 3}
# With operators that need no Python, neither does what calls them and the loops: a sixth of a token's time. What calls
# them is one function of some thousand statements: GCC takes 105 s for that of SmolLM2-135M at -O3, 11 at -O1 and 4 at
# -Og, and a token takes as long. The loops, in a file of their own, stay at -O3: 2.5 s. A precompiled header takes 7 s
# in place of 2, and would pay from the fourth graph on.
WITHOUT_PYTHON = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "aot_inductor.compile_wrapper_opt_level": "Og",
    "cpp_cache_precompile_headers": False,
}
STEPS, FINISHED = 3, "compiled"  # as the progress counts and calls them


def compile_decoding(model: PreTrainedModel, progress: Progress | None = None) -> None:
    """Let `generate` use a static cache and compile the step that makes a token; the first call takes most of a minute.

    progress: told how far compiling is; None logs it, as warnings, so that whoever waits sees it.
    Elsewhere than on a CPU, transformers compiles by itself once the cache is static. Raises UsageError without a C++
    compiler, which torch.compile needs on a CPU.
    """
    config: Any = model.generation_config
    if model.device.type == "cpu":
        if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
            raise UsageError(
                "torch.compile needs a C++ compiler, and neither g++ nor clang++ was found; install one, or load "
                "without compile=True."
            )
        config.compile_config = CompileConfig(backend=backend, mode=None)  # type: ignore[arg-type]
        config.compile_config._compile_all_devices = True
        model.__dict__["_quantc_step"] = _Step(progress)
        model.get_compiled_call = MethodType(_compiled_call, model)  # type: ignore[method-assign]
    config.cache_implementation = "static"


class _Watch:
    """Progress of one compilation after another; `begin` in the middle of one changes nothing."""

    def __init__(self, progress: Progress | None):
        self._progress, self._begun = progress or LogProgress(logging.WARNING), False

    def begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._progress.stage("compiling the step that makes a token", STEPS)
            self._progress.note(f"this takes most of a minute, or seconds where {_cache_folder()} has it already")

    def step(self, name: str) -> None:
        self._progress.step(name)

    def end(self) -> None:
        self._begun = False
        self._progress.done()


def _cache_folder() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())


class _Step:
    """A model's compiled call, and what the model was made of then; a copy of the model starts without."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.structure: list[Any] = []
        self.call: Callable[..., Any] | None = None
        self.watch = _Watch(progress)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Step, ()


def _compiled_call(model: Any, config: CompileConfig | None) -> Callable[..., Any]:
    """Return the compiled call that `generate` asks for once, without transformers' guards on the model's modules.

    There are thousands, checked for every token. Here the modules are looked through once for each text, and compiled
    anew where they are others than before. The backend is one of its own each time, as torch takes any graph of the
    same code and backend whose guards hold.
    """
    if config is None or config.backend is not backend:
        return cast("Callable[..., Any]", type(model).get_compiled_call(model, config))
    step = model.__dict__.setdefault("_quantc_step", _Step())
    structure = _structure(model)
    if step.call is None or step.structure != structure:
        step.structure, step.call = structure, _announced(_compile(model, step.watch), step.watch)
    return cast("Callable[..., Any]", step.call)


def _compile(model: Any, watch: _Watch) -> Callable[..., Any]:
    options: Any = {"guard_filter_fn": _guards_beside_modules(model)}
    own: Any = lambda graph, inputs, **rest: backend(graph, inputs, watch)  # noqa: E731
    return cast("Callable[..., Any]", torch.compile(model.__call__, backend=own, options=options))


def _announced(call: Callable[..., Any], watch: _Watch) -> Callable[..., Any]:
    """Return the call with progress: its first use compiles, and torch reads Python for seconds before the backend."""
    called = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        if not called:
            called = True
            watch.begin()
        return call(*args, **kwargs)

    return run


def _structure(model: torch.nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        tensors = (*module._parameters.values(), *module._buffers.values())
        found += (module, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        found += ((x.dtype, x.device, x.shape, x.requires_grad) for x in tensors if x is not None)
    return found


def _guards_beside_modules(model: torch.nn.Module) -> Callable[[Sequence[Any]], list[bool]]:
    """Return a filter of guards: drop those on what is inside the model, in functions whose self is the model itself.

    Where a model is compiled in parts, those of its blocks share their code, and guards tell the blocks apart.
    """
    owner = weakref.ref(model)

    def stay(guards: Sequence[Any]) -> list[bool]:
        whole = any(guard.name == "self" and guard.value is owner() for guard in guards)
        inside = ("DUPLICATE_INPUT", "OBJECT_ALIASING")
        return [not (whole and (g.name.startswith("self._modules") or g.guard_type in inside)) for g in guards]

    return stay


def backend(graph: fx.GraphModule, inputs: Sequence[Any], watch: _Watch | None = None, **_: Any) -> Callable[..., Any]:
    """Compile a graph for torch.compile: make the rewrites, then call torch's own backend."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    watch = watch or _Watch(None)
    watch.begin()
    watch.step("read the model's code; torch now simplifies it")
    if steps.available():
        join_products(graph)
    open_attention(graph)
    graph.recompile()

    def lower(operations: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        watch.step(f"found {len(operations.graph.nodes)} operations; the rest is writing and compiling their C++")
        return compile_fx_inner(operations, *args, **kwargs)

    compiled: Any = compile_fx(graph, inputs, inner_compile=lower, config_patches=_options())
    watch.step(FINISHED)
    watch.end()
    return cast("Callable[..., Any]", compiled)


def _options() -> dict[str, Any]:
    """Return settings of torch's compiler; `attend`, a function that it does not know, is cached by its source."""
    ours = {f"{attend.__module__}.{attend.__name__}": hashlib.sha256(inspect.getsource(attend).encode()).hexdigest()}
    options = OPTIONS | {"unsafe_marked_cacheable_functions": ours}
    return options | (WITHOUT_PYTHON if steps.available() else {})
