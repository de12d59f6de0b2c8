"""The search of the pass `scale` against the one that AWQ published, in one run: error, KL divergence, CPU seconds.

AWQ (Lin et al. 2023, arXiv:2306.00978) takes the mean magnitude of a channel to a power, in 20 steps from 0 to 1,
centres the scales, rounds all readers to nearest on plain grids from minimum to maximum, and keeps the power of least
output error. Here it stands in for the search of `scale`, so that all else is equal: where scales fold, how they are
proven, how weights are rounded in the end. Magnitudes are root mean squares, and the output error is taken from the
Gram matrix, which is faster than AWQ's own way of running the layer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import quantc
from benchmarks.common import describe, machine, markdown, write_json
from quantc.evaluation.scores import score
from quantc.evaluation.text import read_text
from quantc.evaluation.windows import make_windows
from quantc.frontend import open_model
from quantc.graph.model_graph import Activation, Linear
from quantc.numerics.grids import clipping, fit_grid
from quantc.numerics.qtensor import QTensor
from quantc.numerics.rounding import round_to_nearest
from quantc.numerics.statistics import Gram, output_energy
from quantc.passes.scale import Scale
from quantc.pipeline.base import register
from quantc.pipeline.work import BlockWork
from quantc.progress import LogProgress
from quantc.recipe import Recipe
from quantc.runtime.modules import unpack

STEPS = 20
spent = {"none": 0.0, "scale": 0.0, "published_scale": 0.0}  # CPU seconds of searching


def timed(name: str, search: Any) -> Any:
    def run(*args: Any) -> Any:
        start = time.process_time()
        try:
            return search(*args)
        finally:
            spent[name] += time.process_time() - start

    return run


@register
class PublishedScale(Scale):
    """AWQ's search in place of quantc's."""

    name = "published_scale"

    def search(self, work: BlockWork, item: Activation, readers: list[Linear], gram: Gram) -> torch.Tensor | None:
        matrix = gram.matrix
        magnitude = (matrix.diagonal().double() / gram.rows).sqrt().clamp(min=1e-4)
        best, least = None, float("inf")
        for step in range(STEPS):
            scales = magnitude.pow(step / STEPS).clamp(min=1e-4)
            scales = work.usable_scales(item, scales / (scales.max() * scales.min()).sqrt())
            error = sum(self._error(work, linear, matrix, scales) for linear in readers)
            if error < least:
                best, least = scales, error
        return best

    def _error(self, work: BlockWork, linear: Linear, gram: torch.Tensor, scales: torch.Tensor) -> float:
        spec, weight = work.run.plan.specs[linear.name], work.weight(linear)
        assert spec is not None
        scaled = weight * scales.to(weight)
        clip, clipping.CLIP_RATIOS = clipping.CLIP_RATIOS, (1.0,)
        try:
            grid = fit_grid(scaled, spec)
        finally:
            clipping.CLIP_RATIOS = clip
        rounded = QTensor(spec, round_to_nearest(scaled, grid, spec), grid.scales, grid.zeros).dequantize()
        return output_energy(rounded / scales.to(weight) - weight, gram)


def recipe(method: str, search: str) -> Recipe:
    passes: list[Any] = ["allocate", search, {"quantize": {"method": method, "shrink": 0.0}}]
    return Recipe.from_dict({"version": 1, "passes": [item for item in passes if item != "none"]})


def measure(args: argparse.Namespace, original: Any, windows: Any, method: str, search: str) -> dict[str, Any]:
    spent[search] = 0.0
    with tempfile.TemporaryDirectory(prefix="scale-search-") as scratch:
        report = quantc.quantize(
            args.model, recipe=recipe(method, search), bits=args.bits, group_size=args.group_size,
            out=Path(scratch) / "out", calib=args.calib, samples=args.samples, seq_len=args.seq_len,
        )  # fmt: skip
        packed = quantc.load(Path(scratch) / "out", dtype=torch.float32)
        found = score(unpack(packed, torch.float32), original, windows, LogProgress())
    return {
        "method": method,
        "search": search,
        "bits_per_weight": report.bits_per_weight,
        "mean_error": sum(linear.error for linear in report.linears) / len(report.linears),
        "mean_kl": found.mean_kl,
        "perplexity": found.perplexity,
        "search_cpu_seconds": spent[search],
    }


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("model", help="as `quantc quantize` takes it")
    parser.add_argument("--text", required=True, help="text to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale_search.json"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    Scale.search = timed("scale", Scale.search)  # type: ignore[method-assign]
    PublishedScale.search = timed("published_scale", PublishedScale.search)  # type: ignore[method-assign]
    source = open_model(args.model)
    windows = make_windows(source.tokenizer, read_text(args.text), args.seq_len, None, args.windows)
    original = source.load_whole(torch.float32)
    rows = [
        measure(args, original, windows, method, search)
        for method in ("rtn", "gptq")
        for search in ("none", "published_scale", "scale")
    ]
    write_json(args.out, {"model": Path(args.model).name, "machine": machine(), "rows": rows})
    print(markdown([{key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
