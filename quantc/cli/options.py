"""The options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .parameters import Above, Number, NumberOr, Pin, Share, Whole, WholeOr, Words, as_mapping, options

if TYPE_CHECKING:
    pass

option = click.option
DTYPES = click.Choice(["float32", "bfloat16", "float16"])
COUNT = Whole(1)
PRESETS = click.Choice(["fast", "balanced", "best"])
OUTPUT_OPTIONS = options(
    option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; all else on stderr."),
    option("--quiet", "-q", is_flag=True, help="No progress and no log lines; errors only."),
    option("--verbose", "-v", is_flag=True, help="Also log every linear."),
)
JSON_OPTION = option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
DEVICE_OPTION = option("--device", default="cpu", help="Where to compute: cpu, cuda, cuda:1. [default: cpu]")
TRUST_OPTION = option("--trust-remote-code", is_flag=True, help="Run Python code that the model brings. [default: no]")
CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
YAML_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
CALIBRATION_OPTIONS = options(
    option("--calib", metavar="SOURCE", help="builtin, self, none, a data set, or a text file. [default: builtin]"),
    option("--samples", type=COUNT, help="Windows of calibration text. [default: 64]"),
    option("--seq-len", type=COUNT, help="Tokens per window. [default: 512]"),
    option("--seed", type=Whole(0), help="Seed of everything random. [default: 0]"),
    option(
        "--preset",
        type=PRESETS,
        help="fast: gptq; balanced: also rotated; best: also scaled, corrected, trained. [default: fast]",
    ),
    option("--recipe", type=YAML_FILE, metavar="FILE", help="Take all settings from a recipe (YAML)."),
)
STORAGE_OPTIONS = options(
    option("--group-size", type=Whole(-1), help="Weights per scale; -1: a row. [default: 128 or near]"),
    option("--symmetric/--asymmetric", default=None, help="Zero points: none, or stored. [default: asymmetric]"),
    option("--sparsity", type=NumberOr(0, 1, "2:4", "auto"),
           help="Share of the groups to drop, such as 0.2; or 2:4; auto shares out a budget. [default: none]"),
    option("--head-bits", type=WholeOr("auto", 2, 8),
           help="Quantize embedding and lm head too; auto shares out a size. [default: kept]"),
    option("--pin", "pins", type=Pin(), multiple=True, callback=as_mapping, metavar="NAMES=BITS",
           help="Bits of some linears, such as '*.0.*=8'; 16 keeps them."),
    option("--formats", type=Words(), metavar="LABELS", help="Only these, such as w4g128,w8g128. [default: all]"),
    option("--target", type=click.Choice(["vllm"]), help="Only what this runtime loads. [default: none]"),
)  # fmt: skip
BUDGET_OPTIONS = options(
    option("--avg-bits", type=Number(0, 16), help="Bits per weight on average, all counted, shared out by loss."),
    option("--size", metavar="SIZE", help="How large the weight files may be, such as 300MiB; shared out by loss."),
    option(
        "--search",
        type=Whole(0),
        metavar="N",
        help="Refine the plan by so many generations of search on measured divergence. [default: 0]",
    ),
    STORAGE_OPTIONS,
)
TARGET_OPTIONS = options(
    option("--max-kl", type=Above(0), help="The smallest model that loses so many nats per token at most."),
    option("--max-ppl-increase", type=Share(), metavar="PERCENT", help="The same for the perplexity, such as 2%."),
    option("--text", metavar="SOURCE", help="Text to measure that on. [default: calibration windows kept aside]"),
)
ENOUGH = ("bits", "avg_bits", "size", "max_kl", "max_ppl_increase")  # any of these says how small
QUANTIZE_OPTIONS = options(
    option(
        "--bits",
        "-b",
        type=Number(2, 8),
        help="Bits per code, 2 to 8; 3.25 is an average. Required without --recipe or --plan.",
    ),
    BUDGET_OPTIONS,
    option("--tune-steps", type=COUNT, help="Train every block for so many steps after rounding. [default: none]"),
    option("--tune-budget", metavar="TIME", help="Train for so long in all, such as 10min. [default: as steps take]"),
    TARGET_OPTIONS,
    option("--out", "-o", metavar="FOLDER", help="Where to write. [default: <model>-quantc-w4g128 or so]"),
    option("--method", type=click.Choice(["gptq", "rtn"]), help="How weights are rounded. [default: gptq]"),
    CALIBRATION_OPTIONS,
    option("--plan", type=YAML_FILE, metavar="FILE", help="Take the spec of every linear from a plan (YAML)."),
    DEVICE_OPTION,
    TRUST_OPTION,
    option("--resume", is_flag=True, help="Continue an interrupted run with the same settings, if there is one."),
    option("--force", is_flag=True, help="Replace the output, or what an interrupted run left without --resume."),
    OUTPUT_OPTIONS,
)
