"""Accuracy on tasks beside KL divergence, for a model at several widths; needs lm-eval.

Two kinds of questions that need no hub:
- continuations: which of four continuations of a passage is its own, made from a local text as HellaSwag is made from
  captions. The wrong ones follow other passages near it; no model has filtered them, so it is easier than HellaSwag.
  The same text always gives the same questions.
- files of questions, {"query": "...", "choices": ["...", "..."], "gold": 0} a line, such as ARC-Easy in this form.

Rows are added to --out as they come; a row that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quantc
from benchmarks.common import describe, machine, markdown, write_json

PASSAGE, CONTINUATION, NEAR = 40, 12, 1500  # words
CHOICES = 4
IDENTITY = ("model", "bits", "settings")
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query.strip()}}}}{{{{'\\nAnswer:' if query.startswith('Question:') else ''}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def continuations(text: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield questions from passages evenly over a text: a passage, its continuation, and three from nearby."""
    words, draw = text.split(), random.Random(0)
    last = len(words) - PASSAGE - CONTINUATION
    if last < 2 * NEAR:
        raise SystemExit(f"{len(words):,} words are too few; {2 * NEAR + PASSAGE + CONTINUATION:,} are needed.")
    for number in range(count):
        start = number * last // count
        end = start + PASSAGE
        near = range(max(0, end - NEAR), min(len(words) - CONTINUATION, end + NEAR))
        apart = [place for place in near if not start - CONTINUATION < place < end + CONTINUATION]
        places = [end, *draw.sample(apart, CHOICES - 1)]
        draw.shuffle(places)
        yield {
            "query": " ".join(words[start:end]),
            "choices": [" ".join(words[place : place + CONTINUATION]) for place in places],
            "gold": places.index(end),
        }


def write_tasks(args: argparse.Namespace, folder: Path) -> list[str]:
    """Write a task file for each set of questions; returns their paths."""
    made = folder / "continuations.jsonl"
    questions = continuations(args.text.read_text(encoding="utf-8"), args.continuations)
    made.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    files = {
        "continuations": made,
        **{name: Path(file) for name, _, file in (x.partition("=") for x in args.questions)},
    }
    tasks = []
    for name, file in files.items():
        task = folder / f"{name}.yaml"
        task.write_text(TASK.format(name=name, file=file.resolve()), encoding="utf-8")
        tasks.append(str(task))
    return tasks


def measure(row: dict[str, Any], path: str, tasks: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return a row with its figures; bits None is the original itself."""
    with tempfile.TemporaryDirectory(prefix="tasks-") as scratch:
        model: str | Path = path
        if row["bits"] is not None:
            model = Path(scratch) / "quantized"
            quantc.quantize(
                path, bits=row["bits"], preset=args.preset, out=model, calib=str(args.calib), samples=args.samples,
                seq_len=args.seq_len,
            )  # fmt: skip
        against = None if row["bits"] is None else path
        found = quantc.evaluate(
            model, text=str(args.text), against=against, windows=args.windows, context=args.context, dtype="float32"
        ).to_dict()
        # By itself, as the original's tasks would be scored again beside every width.
        scores = quantc.evaluate(model, tasks=tasks, limit=args.limit, dtype="float32").to_dict()
    figures = {name: found[name] for name in ("bits_per_weight", "perplexity", "mean_kl", "top1_agreement")}
    return {**row, **figures, "tasks": scores["tasks"]}


def shown(rows: list[dict[str, Any]]) -> str:
    """Return a table: a row for each width, a column for each task's accuracy and its standard error."""
    return markdown(
        [
            {
                "bits": f"{row['bits_per_weight']:.2f}",
                "KL": f"{row['mean_kl'] or 0:.4f}",
                **{
                    f"{score['task']} {score['metric']}": f"{score['value']:.3f} ± {score['standard_error']:.3f}"
                    for score in row["tasks"]
                },
            }
            for row in rows
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = describe(__doc__)
    parser.add_argument("--model", nargs=2, required=True, metavar=("NAME", "SOURCE"), help="SOURCE as quantc takes it")
    parser.add_argument("--text", type=Path, required=True, help="text for continuations and for KL divergence")
    parser.add_argument("--calib", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2], help="widths, beside the original")
    parser.add_argument("--preset", default="balanced", help="preset of quantc")
    parser.add_argument("--continuations", type=int, default=1000, metavar="N", help="questions made from the text")
    parser.add_argument("--questions", nargs="*", default=[], metavar="NAME=FILE", help="files of questions")
    parser.add_argument("--limit", type=int, help="questions of each task [default: all]")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each")
    parser.add_argument("--windows", type=int, default=20, help="windows for KL divergence")
    parser.add_argument("--context", type=int, default=512, help="tokens in each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tasks.json"), help="rows are added")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    names = ("preset", "continuations", "limit", "samples", "seq_len", "windows", "context")
    questions = [question.partition("=")[0] for question in args.questions]
    files = {"text": args.text.name, "calibration": args.calib.name, "questions": questions}
    return files | {name: getattr(args, name) for name in names}


def main() -> None:
    args = parse_arguments()
    content = json.loads(args.out.read_text()) if args.out.exists() else {"machine": machine(), "rows": []}
    name, path = args.model
    with tempfile.TemporaryDirectory(prefix="task-files-") as scratch:
        tasks = write_tasks(args, Path(scratch))
        for bits in (None, *args.bits):
            row = {"model": name, "bits": bits, "settings": settings_of(args)}
            if row not in [{key: known[key] for key in IDENTITY} for known in content["rows"]]:
                content["rows"].append(measure(row, path, tasks, args))
                write_json(args.out, content)
    print(shown([row for row in content["rows"] if row["model"] == name and row["settings"] == settings_of(args)]))


if __name__ == "__main__":
    main()
