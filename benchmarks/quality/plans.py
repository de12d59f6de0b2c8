"""The plan of least predicted loss against other ways to share out the same bits, each built and measured.

For an average of bits (all overhead counted) the rivals are

- uniform: every linear in one width, groups of 64, where the average is that of such a width;
- heuristic: as llama.cpp's quantizer gives more to what it knows to be sensitive: value and down projections of the
  first and last eighth of the blocks, then of every third block, then all of them, go up one width from whole rows of
  the largest uniform width that fits, while bits are left;
- random: every linear gets a random format, then random linears go up or down until the bits are used up (seeded).

Every row is built by `quantc quantize --plan`, with the same preset and calibration, and scored as results_table does.
Rows are added to --out as they come.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import describe, machine, markdown, quantize, write_json
from benchmarks.quality.results_table import Scorer, settings_of
from quantc import api
from quantc.plan import Plan
from quantc.planning.budget import stored_bits
from quantc.planning.candidates import CANDIDATE_BITS, candidate_groups
from quantc.spec import WHOLE_ROW, QuantSpec

Specs = dict[str, QuantSpec]


class Rivals:
    """Plans of a model within an average of bits, from the solver's run."""

    def __init__(self, run: api.Run, average: float):
        self.linears = run.graph.linears
        self.blocks = len(run.graph.blocks)
        self.start = {name: spec for name, spec in run.plan.specs.items() if spec is not None}
        self.budget = int(average * sum(linear.weights for linear in self.linears.values()))

    def taken(self, specs: Specs) -> int:
        """Bits of a plan."""
        return sum(stored_bits(self.linears[name], spec) for name, spec in specs.items())

    def uniform(self, bits: int, group: int) -> Specs:
        return {name: replace(spec, bits=bits, group_size=group, wide_rows=0) for name, spec in self.start.items()}

    def at_g64(self) -> Specs | None:
        """The largest uniform width in groups of 64, where it uses up the average to a hundredth."""
        fitting = [plan for bits in CANDIDATE_BITS if self.taken(plan := self.uniform(bits, 64)) <= self.budget]
        return fitting[-1] if fitting and self.taken(fitting[-1]) > 0.99 * self.budget else None

    def heuristic(self) -> Specs:
        rows = [plan for bits in CANDIDATE_BITS if self.taken(plan := self.uniform(bits, WHOLE_ROW)) <= self.budget]
        specs = dict(rows[-1])
        for name in sorted(specs, key=self._rank):
            raised = replace(specs[name], bits=_next_width(specs[name].bits))
            if self.taken({**specs, name: raised}) <= self.budget:
                specs[name] = raised
        return specs

    def _rank(self, name: str) -> tuple[int, int]:
        """Smallest for what llama.cpp gives more first."""
        block = int(next(part for part in name.split(".") if part.isdecimal()))
        favoured = any(word in name for word in ("v_proj", "down_proj"))
        edge = block < self.blocks // 8 or block >= 7 * self.blocks // 8
        third = (block - self.blocks // 8) % 3 == 2
        return (0 if favoured and edge else 1 if favoured and third else 2 if favoured else 3), block

    def random(self, seed: int) -> Specs:
        draw = random.Random(seed)
        specs = {name: self._random_format(draw, name) for name in self.start}
        names = list(specs)
        while (excess := self.taken(specs) - self.budget) > 0 or excess < -0.003 * self.budget:
            name = draw.choice(names)
            changed = self._random_format(draw, name)
            before, after = (self.taken({name: spec}) for spec in (specs[name], changed))
            if (after < before) == (excess > 0) and (excess > 0 or excess + after - before <= 0):
                specs[name] = changed
        return specs

    def _random_format(self, draw: random.Random, name: str) -> QuantSpec:
        groups = candidate_groups(self.linears[name].shape[1])
        return replace(self.start[name], bits=draw.choice((2, 3, 4, 5)), group_size=draw.choice(groups), wide_rows=0)


def _next_width(bits: int) -> int:
    return next(wider for wider in CANDIDATE_BITS if wider > bits)


def plans_of(run: api.Run, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Specs | None]]]:
    """Names of rows, and what makes their plans."""
    rivals = Rivals(run, args.avg_bits)
    yield "solver", lambda: rivals.start
    yield "uniform", rivals.at_g64
    yield "heuristic", rivals.heuristic
    for seed in range(args.seeds):
        yield f"random {seed}", lambda seed=seed: rivals.random(seed)  # type: ignore[misc]


def measure(name: str, chosen: Plan, args: argparse.Namespace, scorer: Scorer) -> dict[str, Any]:
    """Build a plan and score it."""
    with tempfile.TemporaryDirectory(prefix="plans-") as scratch:
        plan, out = Path(scratch) / "plan.yaml", Path(scratch) / "quantized"
        chosen.write(plan)
        calibration = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len}
        measured, summary = quantize(args.model, out, plan=plan, preset=args.preset, **calibration)
        return {
            "plan": name,
            "average": args.avg_bits,
            "bits_per_weight": summary["bits_per_weight"],
            **scorer.score(out),
            "cpu_seconds": measured.cpu_seconds,
            "machine": machine(),
        }


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", required=True, help="as `quantc quantize` takes it")
    parser.add_argument("--avg-bits", type=float, required=True, help="the average that all plans have")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--seeds", type=int, default=20, help="random plans")
    parser.add_argument("--text", type=Path, required=True, help="text to score")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=40, help="windows scored")
    parser.add_argument("--context", type=int, default=512, help="tokens in each")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    args = parser.parse_args()
    args.seq_len, args.head_bits = args.context, None
    return args


def main() -> None:
    args = parse_arguments()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    done = {(row["plan"], row["average"]) for row in rows if row["settings"] == settings_of(args)}
    settings = {"calib": str(args.calib), "samples": args.samples, "seq_len": args.seq_len, "preset": args.preset}
    run = api.plan(args.model, avg_bits=args.avg_bits, **settings)
    scorer = Scorer(args.model, args.text, args)
    for name, make in plans_of(run, args):
        specs = make() if (name, args.avg_bits) not in done else None
        if specs is not None:
            chosen = Plan(dict(specs), salience=run.plan.salience)
            rows.append({**measure(name, chosen, args, scorer), "settings": settings_of(args)})
            write_json(args.out, rows)
            print(f"{name}: {rows[-1]['bits_per_weight']:.3f} bits, KL {rows[-1]['mean_kl']:.4f}", flush=True)
    print(markdown([
        {
            "plan": row["plan"],
            "bits/weight": f"{row['bits_per_weight']:.3f}",
            "mean KL": f"{row['mean_kl']:.4f}",
            "perplexity": f"{row['perplexity']:.2f}",
        }
        for row in sorted(rows, key=lambda row: row["mean_kl"])
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
