"""Compiled decoding on the CPU: transformers' static cache, torch.compile, and two rewrites of the graph before it.

Prompts run as they are, in any length; the graph is that of one token for each text. In it

- products of one tensor with several packed weights become one call (q, k and v; gate and up): a call of an operator
  costs 7 us, as much as a small product. SmolLM2-135M gains 7 %;
- attention of a single query becomes plain sums, which the compiler merges with what stands around them: torch's
  attention is made for many queries. 14 us in place of 70 on 9 heads and 96 positions: another 11 %.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import fx
from torch.nn import functional as F
from transformers import CompileConfig, PreTrainedModel

from .errors import UsageError
from .kernels.cpu import steps
from .kernels.cpu.steps import LARGEST_STEP, NAMES, ROWS

# Loops below this are left to one thread: a token's are of some thousand values, and waking another that sleeps takes
# longer (15 % of a token with OMP_WAIT_POLICY=PASSIVE).
import json
OPTIONS = {"cpp.min_chunk_size": 1 << 16, **json.loads(os.environ.get("OPTS", "{}"))}


def compile_decoding(model: PreTrainedModel) -> None:
    """Let `generate` use a static cache and compile the step that makes a token; the first call takes a minute.

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
    config.cache_implementation = "static"


def backend(graph: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """torch.compile's backend: the rewrites, then torch's own."""
    from torch._inductor.compile_fx import compile_fx

    if steps.available():
        join_products(graph)
    open_attention(graph)
    graph.recompile()
    compiled: Any = compile_fx(graph, inputs, config_patches=OPTIONS)
    return cast("Callable[..., Any]", compiled)


def join_products(graph: fx.GraphModule) -> None:
    """One operator for all native products of the same tensor, where it is computed first."""
    one = torch.ops.quantc.native_matmul
    readers: defaultdict[tuple[Any, ...], list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.target in (one, one.default) and _is_step(node):
            x, _, _, _, _, _, hadamard, int8 = node.args
            readers[x, hadamard, int8].append(node)
    for (x, hadamard, int8), nodes in readers.items():
        for start in range(0, len(nodes), LARGEST_STEP):
            _join(graph.graph, x, nodes[start : start + LARGEST_STEP], hadamard, int8)


def _is_step(node: fx.Node) -> bool:
    x, _, low_rank_a, *_ = node.args
    value = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    if value is None or low_rank_a is not None or not value.is_contiguous():
        return False
    rows = value.numel() // value.shape[-1]
    return isinstance(rows, int) and 0 < rows <= ROWS and not value.requires_grad


def _join(graph: fx.Graph, x: fx.Node, nodes: list[fx.Node], hadamard: Any, int8: Any) -> None:
    images, biases, sizes = ([node.args[place] for node in nodes] for place in (1, 4, 5))
    *leading, k = x.meta["example_value"].shape
    rows = prod(leading)
    biased = sum(1 << place for place, bias in enumerate(biases) if bias is not None)
    step = getattr(torch.ops.quantc, NAMES[len(nodes) - 1]).default
    present = [x if bias is None else bias for bias in biases]
    with graph.inserting_before(nodes[0]):
        joint = graph.call_function(step, (x, *images, *present, biased, hadamard, int(int8), sum(sizes)))
        start = 0
        for node, n in zip(nodes, sizes, strict=True):
            own = graph.call_function(torch.narrow, (joint, 0, start, rows * n))
            node.replace_all_uses_with(graph.call_method("view", (own, *leading, n)))
            start += rows * n
    for node in nodes:
        graph.erase_node(node)


def open_attention(graph: fx.GraphModule) -> None:
    """`attend` in place of torch's attention where there is one query."""
    for node in graph.graph.nodes:
        if node.target is F.scaled_dot_product_attention and _has_one_query(node):
            node.target = attend


def _has_one_query(node: fx.Node) -> bool:
    query = node.args[0] if node.args else node.kwargs.get("query")
    value = query.meta.get("example_value") if isinstance(query, fx.Node) else None
    given = node.kwargs
    plain = not (given.get("is_causal") or given.get("dropout_p") or len(node.args) > 4)
    return plain and value is not None and bool(value.shape[-2] == 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's attention gives for query (..., H, 1, D), key and value (..., H, T, D): sums in float32 or wider."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scaled * key.to(wide)).sum(-1).unsqueeze(-2)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    weights = torch.softmax(scores, -1)
    return (weights.transpose(-1, -2) * value.to(wide)).sum(-2, keepdim=True).to(query.dtype)
