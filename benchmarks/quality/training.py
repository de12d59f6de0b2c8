"""What each part of training gives: a recipe without it, with it, with parts of it, over windows of several lengths.

Every row is a run of `quantc quantize` in a process of its own, its passes followed by `tune` or `distill` with the
settings that the row names, and the KL divergence of the result from the original on the first windows of every text.
Calibrate on one kind of text and score on two, to see what training gives on the other kind.

Rows are added to --out as they come; a row that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import describe, machine, markdown, quantize, write_json
from benchmarks.quality.results_table import Scorer, named_path

# What a row adds to the recipe: pass -> settings; `tune` takes --steps besides.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "nothing": {},
    "tune": {"tune": {}},
    "codes": {"tune": {"scales": False}},
    "scales": {"tune": {"codes": False}},
    "window-1": {"tune": {"window": 1}},
    "window-3": {"tune": {"window": 3}},
    "distill": {"distill": {}},
    "tune-distill": {"tune": {}, "distill": {}},
}
IDENTITY = ("model", "recipe", "variant", "settings")


def recipe_of(base: str, variant: str, steps: int) -> dict[str, Any]:
    """The base recipe with what the variant adds to its passes."""
    from quantc.recipe import preset, read_recipe

    recipe = (read_recipe(Path(base)) if base.endswith(".yaml") else preset(base)).to_dict()
    for name, settings in VARIANTS[variant].items():
        recipe["passes"].append({name: settings | ({"steps": steps} if name == "tune" else {})})
    return recipe


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What besides model, recipe and variant makes two rows comparable."""
    kept = ("bits", "group_size", "steps", "samples", "context", "windows")
    named = {key: getattr(args, key) for key in kept}
    return named | {"calibration": Path(args.calib).name, "texts": [text.name for text in args.text]}


def measure(name: str, path: str, variant: str, scorers: dict[str, Scorer], args: argparse.Namespace) -> dict[str, Any]:
    """One row: quantize, load, score on every text."""
    with tempfile.TemporaryDirectory(prefix="training-") as scratch:
        recipe, out = Path(scratch) / "recipe.yaml", Path(scratch) / "quantized"
        recipe.write_text(yaml.safe_dump(recipe_of(args.base, variant, args.steps)), encoding="utf-8")
        options = {"bits": args.bits, "group_size": args.group_size, "recipe": recipe}
        calibration = {"calib": args.calib, "samples": args.samples, "seq_len": args.context}
        measured, summary = quantize(path, out, args.threads, asymmetric=True, **options, **calibration)
        return {
            "model": name,
            "recipe": Path(args.base).stem,
            "variant": variant,
            "settings": settings_of(args),
            "mean_kl": {text: scorer.score(out)["mean_kl"] for text, scorer in scorers.items()},
            "cpu_seconds": measured.cpu_seconds,
            "peak_rss_bytes": measured.peak_rss_bytes,
            "notes": [note for note in summary["notes"] if note.startswith(("tune", "distill"))],
            "machine": machine(),
        }


def show(rows: list[dict[str, Any]]) -> None:
    print(markdown([
        {
            "model": row["model"],
            "recipe": row["recipe"],
            "variant": row["variant"],
            **{text: f"{kl:.4f}" for text, kl in row["mean_kl"].items()},
            "CPU s": f"{row['cpu_seconds']:.0f}",
            "peak RSS": f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            "notes": "; ".join(row["notes"]),
        }
        for row in rows
    ]))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", type=named_path, required=True, metavar="NAME=PATH", help="a model, and its name")
    parser.add_argument("--base", required=True, help="preset or recipe file that training is added to")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows to measure")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="texts to score")
    parser.add_argument("--calib", required=True, help="text to calibrate on, as `quantc quantize` takes it")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50, help="of tune for each block")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--context", type=int, default=512, help="tokens in each window")
    parser.add_argument("--windows", type=int, default=20, help="windows scored of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"), help="result file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else []
    name, path = args.model
    known = [[row[key] for key in IDENTITY] for row in rows]
    missing = [v for v in args.variants if [name, Path(args.base).stem, v, settings_of(args)] not in known]
    scorers = {text.name: Scorer(path, text, args) for text in args.text} if missing else {}
    for variant in missing:
        rows.append(measure(name, path, variant, scorers, args))
        write_json(args.out, rows)
        show(rows[-1:])
    show(rows)


if __name__ == "__main__":
    main()
