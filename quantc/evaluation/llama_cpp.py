"""llama.cpp itself, as the package xllamacpp brings it: its C functions, called by ctypes.

Structs are passed by value, so the build is fixed by the package's version, and the defaults that it returns are
compared with what is known of it before anything else is called.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ModelError
from ..frontend.auto import first_line

PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
DEFAULT_CONTEXT = (512, 2048, 512, 1, 0, 0, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max, three counts of outputs
VOCABULARY_ONLY = 72  # bytes in llama_model_params
FLASH_ATTENTION, CACHE_TYPES = 13, (26, 27)  # words in llama_context_params
LAST_MESSAGES = 3  # of llama.cpp's log, quoted where it refuses a file


class _Params(ctypes.Structure):
    """Parameters of a model or a context: longer than either, which is safe as they are passed in memory, last."""

    _fields_ = (("words", ctypes.c_int32 * 64),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_messages: list[str] = []


@_LOG
def _log(level: int, text: bytes, _: Any) -> None:
    if level >= 3:  # warnings and errors
        _messages.append(text.decode("utf-8", "replace").strip())
        del _messages[:-LAST_MESSAGES]


def missing() -> str | None:
    """Return why llama.cpp cannot be used here, or None where it can."""
    if find_spec(PACKAGE) is None:
        return f"{PACKAGE} is not installed; run `pip install {PACKAGE}=={VERSION}`"
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = "unknown"
    if found != VERSION:
        return f"{PACKAGE} {found} is installed, not {VERSION}; run `pip install {PACKAGE}=={VERSION}`"
    try:
        import_module(f"{PACKAGE}.{PACKAGE}")
    except (ImportError, OSError) as error:  # it needs a processor and a C library that its build knows
        return f"{PACKAGE} cannot be imported ({first_line(error)})"
    return None


@cache
def _library() -> Any:
    """Return the functions of llama.cpp; raises ModelError where the package is another build than the one known."""
    if (reason := missing()) is not None:
        raise ModelError(f"llama.cpp cannot be asked: {reason}.")
    library = ctypes.CDLL(import_module(f"{PACKAGE}.{PACKAGE}").__file__)
    results = {
        "llama_model_default_params": _Params, "llama_context_default_params": _Params,
        "llama_model_load_from_file": ctypes.c_void_p, "llama_init_from_model": ctypes.c_void_p,
        "llama_model_get_vocab": ctypes.c_void_p, "llama_get_memory": ctypes.c_void_p,
        "llama_batch_init": _Batch, "llama_get_logits": ctypes.POINTER(ctypes.c_float),
    }  # fmt: skip
    for name, result in results.items():
        getattr(library, name).restype = result
    library.llama_log_set(_log, None)
    defaults = library.llama_context_default_params()
    if tuple(defaults.words[: len(DEFAULT_CONTEXT)]) != DEFAULT_CONTEXT:
        raise ModelError(f"llama.cpp in {PACKAGE} has other structs than {VERSION} has; reinstall that version.")
    library.llama_backend_init()
    return library


class LlamaCpp(AbstractContextManager["LlamaCpp"]):
    """A GGUF file opened by llama.cpp, on the CPU; raises ModelError with its reason where it refuses the file.

    context: the most tokens that are read at once; 0 opens the vocabulary alone.
    """

    def __init__(self, file: Path, context: int = 0):
        self.file, self.length = file, context
        self._library = _library()
        self._context: int | None = None
        self._model = self._load(context == 0)
        self._vocabulary = ctypes.c_void_p(self._library.llama_model_get_vocab(ctypes.c_void_p(self._model)))
        if context:
            self._context = self._open_context(context)
        self.tokens: int = self._library.llama_vocab_n_tokens(self._vocabulary)

    def _load(self, vocabulary_only: bool) -> int:
        params = self._library.llama_model_default_params()
        ctypes.memmove(ctypes.byref(params, VOCABULARY_ONLY), bytes([vocabulary_only]), 1)
        _messages.clear()
        model = self._library.llama_model_load_from_file(os.fsencode(self.file), params)
        if not model:
            raise ModelError(f"llama.cpp cannot load {self.file} ({_reason()}); report this with the model's name.")
        return int(model)

    def _open_context(self, length: int) -> int:
        """Return a context that reads `length` tokens at once, its keys and values in float32."""
        params = self._library.llama_context_default_params()
        params.words[:3] = [length] * 3
        threads = min(torch.get_num_threads(), os.cpu_count() or 1)
        params.words[7:9] = [threads] * 2
        params.words[FLASH_ATTENTION] = 0
        for place in CACHE_TYPES:
            params.words[place] = 0
        context = self._library.llama_init_from_model(ctypes.c_void_p(self._model), params)
        if not context:
            reason = _reason()
            self.close()
            raise ModelError(f"llama.cpp cannot read {length} tokens of {self.file} at once ({reason}); shorten them.")
        return int(context)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32 (T, V) for a sequence of tokens (T,), at most `context` of them."""
        memory = self._library.llama_get_memory(ctypes.c_void_p(self._context))
        self._library.llama_memory_clear(ctypes.c_void_p(memory), True)
        return self.more_logits(tokens, 0)

    def more_logits(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Return float32 (T, V) for tokens (T,) that follow the `start` ones that were read before."""
        library, context, count = self._library, ctypes.c_void_p(self._context), len(tokens)
        batch = library.llama_batch_init(count, 0, 1)
        try:
            for place, token in enumerate(tokens.tolist()):
                batch.token[place], batch.pos[place] = token, start + place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            batch.n_tokens = count
            failed = library.llama_decode(context, batch)
        finally:
            library.llama_batch_free(batch)
        if failed:
            raise ModelError(f"llama.cpp cannot run {self.file} ({_reason() or failed}); report this with its name.")
        found = np.ctypeslib.as_array(library.llama_get_logits(context), (count, self.tokens))
        return torch.from_numpy(found.copy())

    def use_threads(self, count: int) -> None:
        """Compute on that many threads from now on."""
        self._library.llama_set_n_threads(ctypes.c_void_p(self._context), count, count)

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without BOS and EOS; texts of special tokens are taken as text."""
        content = text.encode()
        room = len(content) + 8
        found = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, content, len(content), found, room, False, False)
        return list(found[: max(0, count)])

    def close(self) -> None:
        """Free what llama.cpp holds."""
        if self._context is not None:
            self._library.llama_free(ctypes.c_void_p(self._context))
        if self._model:
            self._library.llama_model_free(ctypes.c_void_p(self._model))
        self._context, self._model = None, 0

    def __exit__(self, *_: object) -> None:
        self.close()


def _reason() -> str:
    return "; ".join(_messages)
