"""Times ggml's matmul, as llama.cpp uses it, on the shapes of benchmarks.speed.cpu_matmul.

    python benchmarks/speed/ggml_matmul.py LIBRARY... --shape 4096 4096 --tokens 1 4 16

LIBRARY: libggml-base.so and libggml-cpu.so of a llama.cpp, or any library that exports ggml, such as that of xllamacpp.
Weights lie in ggml's own orders (repacked, or AMX tiles) where it has one for the type, as llama.cpp loads them, and
also as they are stored. Prints JSON: best milliseconds of a product by type, order and rows. It has a process of its
own, without torch: two thread pools on the same cores would wait for each other. x is float32, which ggml rounds to 8
bits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q4_K": 12}  # enum ggml_type of ggml.h
FLOAT32 = 0
COLD_BYTES = 96 << 20  # of weights in turn, as in cpu_matmul.py


class InitParams(Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_dev_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class Ggml:
    """The functions of SIGNATURES, from whichever library has them."""

    def __init__(self, libraries: list[str], threads: int):
        loaded = [ctypes.CDLL(library, ctypes.RTLD_GLOBAL) for library in libraries]
        for name, (result, arguments) in SIGNATURES.items():
            found = next((getattr(library, name) for library in loaded if hasattr(library, name)), None)
            if found is None:
                raise SystemExit(f"none of {', '.join(libraries)} has {name}; name all libraries of one ggml.")
            found.restype, found.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), found)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.device = self.backend_get_device(self.backend)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def orders(self) -> dict[str, int]:
        """The kinds of memory that weights can lie in, by name."""
        found = [self.backend_dev_buffer_type(self.device)]
        registry = self.backend_dev_backend_reg(self.device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.device)
            at = 0
            while extra and extra[at]:
                found.append(extra[at])
                at += 1
        return {self.backend_buft_name(kind).decode(): kind for kind in found}

    def quantized(self, kind: int, weight: np.ndarray) -> np.ndarray:
        """Rows of a weight (N, K) as ggml stores them: bytes."""
        n, k = weight.shape
        out = np.empty(4 * n * k, np.uint8)
        source = weight.ctypes.data_as(POINTER(c_float))
        size = self.quantize_chunk(kind, source, out.ctypes.data, 0, n, k, None)
        return out[:size]

    def context(self) -> int:
        return int(self.init(InitParams(1 << 20, None, True)))


class Product:
    """One weight and a graph that multiplies x (M, K) with it. runs: whether the order has a kernel for the type."""

    def __init__(self, ggml: Ggml, order: int, kind: int, stored: np.ndarray, shape: tuple[int, int], x: np.ndarray):
        self.ggml, self.shape = ggml, (len(x), shape[0])
        self.weights, self.others = ggml.context(), ggml.context()
        weight = ggml.new_tensor_2d(self.weights, kind, shape[1], shape[0])
        inputs = ggml.new_tensor_2d(self.others, FLOAT32, shape[1], len(x))
        self.y = ggml.mul_mat(self.others, weight, inputs)
        memory = ggml.backend_alloc_ctx_tensors_from_buft(self.weights, order)
        self.memories = [memory] if memory else []
        self.runs = bool(memory) and ggml.backend_dev_supports_op(ggml.device, self.y)
        if not self.runs:
            return
        ggml.backend_tensor_set(weight, stored.ctypes.data, 0, stored.nbytes)
        self.memories.append(
            ggml.backend_alloc_ctx_tensors_from_buft(self.others, ggml.backend_dev_buffer_type(ggml.device))
        )
        ggml.backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
        self.graph = ggml.new_graph(self.others)
        ggml.build_forward_expand(self.graph, self.y)

    def run(self) -> None:
        self.ggml.backend_graph_compute(self.ggml.backend, self.graph)

    def result(self) -> np.ndarray:
        out = np.empty(self.shape, np.float32)
        self.ggml.backend_tensor_get(self.y, out.ctypes.data, 0, out.nbytes)
        return out

    def free(self) -> None:
        for memory in self.memories:
            self.ggml.backend_buffer_free(memory)
        self.ggml.free(self.weights)
        self.ggml.free(self.others)


def best_ms(products: list[Product], seconds: float) -> float:
    best, end, at = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < end or at < 3:
        start = time.perf_counter()
        products[at % len(products)].run()
        best, at = min(best, time.perf_counter() - start), at + 1
    return best * 1e3


def measure(ggml: Ggml, shape: tuple[int, int], tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    rows = []
    generator = np.random.default_rng(0)
    weight = generator.standard_normal(shape, np.float32)
    for name, kind in TYPES.items():
        if shape[1] % (256 if name == "Q4_K" else 32):
            continue
        stored = ggml.quantized(kind, weight)
        count = max(1, -(-COLD_BYTES // stored.nbytes))
        for order, memory in ggml.orders().items():
            for m in tokens:
                x = generator.standard_normal((m, shape[1]), np.float32)
                products = [Product(ggml, memory, kind, stored, shape, x) for _ in range(count)]
                if products[0].runs:
                    ms = best_ms(products, seconds)
                    exact = x @ weight.T
                    error = float(np.linalg.norm(products[0].result() - exact) / np.linalg.norm(exact))
                    found = {"type": name, "order": order, "M": m}
                    rows.append(found | {"ms": ms, "bytes": stored.nbytes, "error": error})
                for product in products:
                    product.free()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", metavar="LIBRARY")
    parser.add_argument("--shape", nargs=2, type=int, required=True, metavar=("N", "K"))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    args = parser.parse_args()
    rows = measure(Ggml(args.libraries, args.threads), tuple(args.shape), args.tokens, args.seconds)
    sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
