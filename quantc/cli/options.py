"""The options that commands share, by the heading that `--help` lists them under."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from ..units import FLOAT_DTYPES
from .headings import CALIBRATION, MEASURED, METHOD, OUTPUT, RUN, SIZE, STORAGE, Decorator, option, options
from .parameters import Above, Number, NumberOr, Pin, Share, Whole, WholeOr, Words, as_mapping

COUNT = Whole(1)
PRESETS = click.Choice(["fast", "balanced", "best"])
# Of planning/targets.py.
TARGETS = ["gguf", "vllm", "vllm-rotated", "compressed-tensors", "gptq", "awq", "auto-round", "mlx"]
CHECKPOINT = click.argument("checkpoint", type=click.Path(path_type=Path))
YAML_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

measured, size, stored, rounded, calibration, output, run = (
    partial(option, heading=heading) for heading in (MEASURED, SIZE, STORAGE, METHOD, CALIBRATION, OUTPUT, RUN)
)


def dtype_option(default: str) -> Decorator:
    """Return the option --dtype of a command with this default."""
    return run(
        "--dtype", type=click.Choice(FLOAT_DTYPES), metavar="TYPE",
        help=f"Type of the activations: float32, bfloat16 or float16. [default: {default}]",
    )  # fmt: skip


BITS_OPTION = size(
    "--bits",
    "-b",
    type=Number(1, 8),
    help="Bits per code, 2 to 8 (trellis codes: 1 to 5); 3.25 is the same as --avg-bits 3.25.",
)
BUDGET_OPTIONS = options(
    size("--size", metavar="SIZE",
         help="Largest size of the weight files, or of the GGUF file, such as 300MiB; each layer's bits are chosen by "
              "predicted loss."),
    size("--avg-bits", type=Number(0, 16),
         help="Average bits per weight, scales included; each layer's bits are chosen by predicted loss."),
)  # fmt: skip
QUALITY_OPTIONS = options(
    size("--max-kl", type=Above(0),
         help="Build the smallest model whose KL divergence from the original is at most this (nats per token)."),
    size("--max-ppl-increase", type=Share(), metavar="PERCENT",
         help="Build the smallest model whose perplexity rises by at most this, such as 2%."),
    size("--text", metavar="SOURCE",
         help="Text that --max-kl or --max-ppl-increase is measured on. [default: held-out calibration windows]"),
)  # fmt: skip
LIKE_OPTION = size(
    "--like", metavar="MIX",
    help="Write a GGUF file no larger than llama.cpp's quantizer makes with this mix, such as Q4_K_M.",
)  # fmt: skip
PLAN_OPTION = size("--plan", type=YAML_FILE, metavar="FILE", help="Build this plan (YAML) of `quantc plan`.")
STORAGE_OPTIONS = options(
    stored("--group-size", type=Whole(-1),
           help="Weights that share a scale; -1 for a whole row. [default: 128 or near]"),
    stored("--code", type=click.Choice(["grid", "trellis", "auto"]), metavar="NAME",
           help="Codes of layers: grid, trellis (1 to 5 bits, loses less), or auto, what loses less. [default: grid]"),
    stored("--symmetric/--asymmetric", default=None,
           help="Leave zero points out, or store them. [default: asymmetric]"),
    stored("--head-bits", type=WholeOr(2, 8, "keep", "auto"),
           help="Bits of embedding and head; keep leaves them, auto chooses within --size. [default: 8, or keep]"),
    stored("--pin", "pins", type=Pin(), multiple=True, callback=as_mapping, metavar="NAMES=BITS",
           help="Set the bits of some layers, such as '*.0.*=8'; 16 leaves them unquantized. May be repeated."),
    stored("--sparsity", type=NumberOr(0, 1, "2:4", "auto"),
           help="Share of the groups to drop, such as 0.2, or 2:4; auto chooses within a budget. [default: none]"),
    stored("--formats", type=Words(), metavar="LABELS",
           help="Allow only these formats, such as w4g128,w8g128; one alone, such as mxfp4, is used everywhere."),
    stored("--target", type=click.Choice(TARGETS),
           metavar="NAME",
           help="Store layers as this runtime loads them; `quantc targets` lists them. [default: none]"),
)  # fmt: skip
RECIPE_OPTIONS = options(
    rounded("--preset", type=PRESETS,
            help="fast: GPTQ; balanced: also rotates; best: also scales, corrects and trains. [default: balanced]"),
    rounded("--recipe", type=YAML_FILE, metavar="FILE", help="Read the settings from a recipe (YAML)."),
)  # fmt: skip
METHOD_OPTION = rounded(
    "--method", type=click.Choice(["gptq", "rtn"]),
    help="Round with error feedback (gptq) or to nearest (rtn). [default: gptq]",
)  # fmt: skip
SEARCH_OPTION = rounded(
    "--search", type=Whole(0), metavar="N",
    help="Refine the plan by N generations of search on measured KL divergence. [default: 0]",
)  # fmt: skip
TRAINING_OPTIONS = options(
    rounded("--tune-steps", type=COUNT, help="Train every block for N steps after rounding. [default: none]"),
    rounded("--tune-budget", metavar="TIME",
            help="Train for at most this long in total, such as 10min. [default: no limit]"),
)  # fmt: skip
CALIBRATION_OPTIONS = options(
    calibration("--calib", metavar="SOURCE",
                help="Calibration text: builtin, self, none, a data set or a text file. [default: builtin]"),
    calibration("--samples", type=COUNT, help="Windows of calibration text. [default: 64]"),
    calibration("--seq-len", type=COUNT, help="Tokens per window. [default: 512]"),
    calibration("--seed", type=Whole(0), help="Seed of all random numbers. [default: 0]"),
)  # fmt: skip
OUTPUT_OPTIONS = options(
    output("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, everything else on stderr."),
    output("--quiet", "-q", is_flag=True, help="Print errors only."),
    output("--verbose", "-v", is_flag=True, help="Log every layer."),
)
JSON_OPTION = option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
DEVICE_OPTION = run("--device", default="cpu", help="Where to compute: cpu, cuda or cuda:1. [default: cpu]")
TRUST_OPTION = run("--trust-remote-code", is_flag=True, help="Run Python code that the model brings. [default: no]")
MODEL_OPTIONS = options(DEVICE_OPTION, TRUST_OPTION)

ENOUGH = ("bits", "avg_bits", "size", "like", "max_kl", "max_ppl_increase")  # any of these says how small
QUANTIZE_OPTIONS = options(
    BITS_OPTION, BUDGET_OPTIONS, LIKE_OPTION, QUALITY_OPTIONS, PLAN_OPTION,
    STORAGE_OPTIONS,
    RECIPE_OPTIONS, METHOD_OPTION, SEARCH_OPTION, TRAINING_OPTIONS,
    CALIBRATION_OPTIONS,
    output("--out", "-o", metavar="FOLDER",
           help="Folder to write, or a file for llama.cpp: model.gguf. [default: <model>-quantc-w4g128 or so]"),
    output("--force", is_flag=True, help="Replace the output, or without --resume what an interrupted run left."),
    OUTPUT_OPTIONS,
    MODEL_OPTIONS,
    run("--resume", is_flag=True, help="Continue an interrupted run that had the same settings, if there is one."),
)  # fmt: skip
PLANNING_OPTIONS = options(
    BUDGET_OPTIONS, STORAGE_OPTIONS, RECIPE_OPTIONS, SEARCH_OPTION, CALIBRATION_OPTIONS,
    output("--out", "-o", default="plan.yaml", type=click.Path(path_type=Path), metavar="FILE",
           help="File to write. [default: plan.yaml]"),
    output("--force", is_flag=True, help="Replace the plan if it exists."),
    OUTPUT_OPTIONS,
    MODEL_OPTIONS,
)  # fmt: skip
PARETO_OPTIONS = options(
    measured("--verify", type=Whole(0), default=0, metavar="N", help="Build and measure N of the points. [default: 0]"),
    measured("--text", metavar="SOURCE", help="Text to measure them on, as for `quantc eval`."),
    STORAGE_OPTIONS, RECIPE_OPTIONS, CALIBRATION_OPTIONS,
    output("--out", "-o", default=".", metavar="FOLDER", type=click.Path(path_type=Path),
           help="Folder of pareto.html and pareto.png. [default: the current folder]"),
    output("--force", is_flag=True, help="Replace these two files if they exist."),
    OUTPUT_OPTIONS,
    MODEL_OPTIONS,
)  # fmt: skip
TEXT_HELP = "A .txt, .jsonl or .parquet file, or a data set such as wikitext2."
TEXT_OPTION = measured("--text", required=True, metavar="SOURCE", help=TEXT_HELP)
WINDOW_OPTIONS = options(
    measured("--context", type=Whole(2), help="Tokens per window. [default: 512, or the model's limit]"),
    measured("--windows", type=COUNT, help="Measure the first N windows only. [default: all]"),
    measured("--stride", type=COUNT, help="Tokens between the starts of windows. [default: the context]"),
)
EVALUATE_OPTIONS = options(
    measured("--text", metavar="SOURCE", help=TEXT_HELP),
    measured(
        "--tasks",
        type=Words(),
        help="Tasks of lm-eval, such as arc_easy,hellaswag, or paths of task files: ./my_task.yaml.",
    ),
    measured("--against", metavar="MODEL", help="Compare with this original. [default: none]"),
    WINDOW_OPTIONS,
    measured("--limit", type=COUNT, help="Ask the first N questions of each task only. [default: all]"),
    measured("--few-shot", type=Whole(0), help="Solved examples before each question. [default: as the task says]"),
    OUTPUT_OPTIONS,
    dtype_option("the model's own, or float32 where faster"),
    MODEL_OPTIONS,
)
COMPARE_OPTIONS = options(
    TEXT_OPTION,
    measured("--blocks", is_flag=True, help="Also measure each decoder block's output against the first model's."),
    WINDOW_OPTIONS,
    output("--page", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
           help="Write an HTML page with tables and plots. [default: none]"),
    OUTPUT_OPTIONS,
    dtype_option("the models' own, or float32 where faster"),
    MODEL_OPTIONS,
)  # fmt: skip
CHECK_OPTIONS = options(
    measured("--against", required=True, metavar="MODEL", help="The original."),
    TEXT_OPTION,
    measured("--max-kl", type=Above(0), help="The largest KL divergence from the original (nats per token)."),
    measured("--max-ppl-increase", type=Share(), metavar="PERCENT",
             help="The largest increase of the perplexity, such as 2%."),
    WINDOW_OPTIONS,
    OUTPUT_OPTIONS,
    dtype_option("the models' own, or float32 where faster"),
    MODEL_OPTIONS,
)  # fmt: skip
EXPORT_OPTIONS = options(
    output("--to", type=click.Choice(TARGETS), default="gguf", metavar="NAME",
           help="The runtime or container; `quantc targets` lists them. [default: gguf]"),
    output("--out", "-o", metavar="PATH", type=click.Path(path_type=Path),
           help="The file or folder. [default: CHECKPOINT.gguf, CHECKPOINT-NAME]"),
    output("--no-tokenizer", is_flag=True, help="GGUF: write no tokenizer; the file takes token ids alone."),
    output("--pre-tokenizer", metavar="NAME",
           help="GGUF: what llama.cpp calls this tokenizer's rules. [default: found]"),
    output("--metadata", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
           help="GGUF: keep the metadata of this file. [default: of the one the checkpoint was made from]"),
    output("--force", is_flag=True, help="Replace what quantc wrote there."),
    OUTPUT_OPTIONS,
)  # fmt: skip
