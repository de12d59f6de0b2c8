"""Rewrites of the graph of a single token, before torch's compiler gets it.

- Native products become operators that torch calls without Python (kernels/cpu/steps.py), one for all weights that read
  the same tensor (q, k and v; gate and up), and so does everything between them;
- attention of a single query becomes plain sums, which the compiler merges with what is around them: torch's
  attention is made for many queries. 14 us in place of 70 on 9 heads and 96 positions: another 11 %.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import Any, cast

import torch
from torch import fx
from torch.nn import functional as F

from ..kernels.cpu.steps import LARGEST_STEP, NAMES, ROWS


def join_products(graph: fx.GraphModule) -> None:
    """Make one operator of all native products of the same tensor, where it is computed first."""
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
    images, biases, sizes = (cast("list[Any]", [node.args[place] for node in nodes]) for place in (1, 4, 5))
    *leading, _ = x.meta["example_value"].shape
    rows = prod(leading)
    biased = sum(1 << place for place, bias in enumerate(biases) if bias is not None)
    step = getattr(torch.ops.quantc, NAMES[len(nodes) - 1]).default
    present = [x if bias is None else bias for bias in biases]
    with graph.inserting_before(nodes[0]):
        joint = graph.call_function(step, (x, *images, *present, biased, hadamard, int(int8), sum(sizes)))
        start = 0
        for node, n in zip(nodes, sizes, strict=True):
            own = graph.call_function(torch.narrow, (joint, 0, start, rows * n))
            product = graph.call_function(torch.reshape, (own, (*leading, n)))
            product.meta["example_value"] = node.meta["example_value"]  # torch caches no methods of what has none
            node.replace_all_uses_with(product)
            start += rows * n
    for node in nodes:
        graph.erase_node(node)


def open_attention(graph: fx.GraphModule) -> None:
    """Put `attend` in place of torch's attention where there is one query."""
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
    """Compute torch's attention for query (..., H, 1, D), key and value (..., H, T, D): sums in float32 or wider."""
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
