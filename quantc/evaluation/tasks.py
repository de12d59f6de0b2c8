"""Tasks: multiple choice and others, of lm-eval or in files of its format, and what a model scores on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ModelError, UsageError, in_one_sentence
from ..files.untrusted import nearest
from ..frontend.auto import first_line
from ..progress import Progress
from .harness import as_language_model, check_installed, quiet

ENDINGS = (".yaml", ".yml")
EXAMPLES_SEED = 1234  # of the examples that --few-shot shows: lm-eval's own default
RESAMPLES = 1000  # for the standard error of metrics that are no averages
OWN_DATA = "pass a task file whose data is on this machine"


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task.

    metric: lm-eval's name, with the name of a filter where the task has one. standard_error: None where lm-eval has
    none. original: the value of the original, None without one. samples: how many questions were asked. few_shot: how
    many solved examples each of them had in front.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    original: float | None
    samples: int
    few_shot: int


class Tasks:
    """Tasks whose data was read: what is wrong with them is found before a model is loaded.

    names: tasks of lm-eval, task files, and folders of those. limit: questions of each that are asked, the first ones;
    None is all. few_shot: solved examples in front of each, None is what a task asks for. Raises UsageError for a
    package that is missing and for tasks that are unknown or damaged, ModelError for data that is out of reach.
    """

    def __init__(self, names: Sequence[str], limit: int | None = None, few_shot: int | None = None):
        check_installed()
        self._limit = limit
        self._loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
        with quiet():
            for key, found in self._read(names):
                self._loaded[key].update(found)
        for name, task in self._loaded["tasks"].items():
            _check_safe(name, task)
            _set_examples(task, few_shot)

    def _read(self, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        from lm_eval.tasks import TaskManager

        local = [_is_path(name) for name in names]
        manager = TaskManager(include_defaults=not all(local))  # its own tasks are thousands of files
        for name, is_path in zip(names, local, strict=True):
            files = task_files(Path(name)) if is_path else []
            for parts in [_load_file(manager, file) for file in files] if is_path else [_load_named(manager, name)]:
                yield from parts.items()

    def score(self, model: Any, original: Any | None, tokenizer: Any, progress: Progress) -> tuple[TaskScore, ...]:
        """Return the scores of a model, and the original's beside them if there is one."""
        found = self._scores(model, tokenizer, progress)
        if original is None:
            return tuple(found)
        expected = {(row.task, row.metric): row.value for row in self._scores(original, tokenizer, progress)}
        return tuple(replace(row, original=expected.get((row.task, row.metric))) for row in found)

    def _scores(self, model: Any, tokenizer: Any, progress: Progress) -> list[TaskScore]:
        from lm_eval.evaluator import evaluate

        with quiet(progress), in_one_sentence(partial(_failed, ", ".join(self._loaded["tasks"]))):
            results = evaluate(
                lm=as_language_model(model, tokenizer),
                task_dict=self._loaded,
                limit=self._limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
            )
            return list(rows_of(results))


def task_files(path: Path) -> list[Path]:
    """Return a task file, or those of a folder; raises UsageError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"there is no task file {path}; check the path, which counts from {Path.cwd()}.")
    found = [file for file in sorted(path.iterdir()) if file.suffix in ENDINGS and _is_task(file)]
    if not found:
        raise UsageError(f"{path} has no task file; a .yaml file with the key task, in lm-eval's format, is needed.")
    return found


def rows_of(results: dict[str, Any]) -> Iterator[TaskScore]:
    """Yield the metrics of lm-eval's results that are numbers, tasks and groups in its order."""
    counts, shots = results.get("n-samples", {}), results.get("n-shot", {})
    for task, row in {**results["results"], **results.get("groups", {})}.items():
        samples = counts.get(task, {}).get("effective") or row.get("sample_len") or 0
        for key, value in row.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = row.get(f"{metric}_stderr,{rule}")
            name = metric if rule == "none" else f"{metric} ({rule})"
            measured = float(error) if isinstance(error, (int, float)) else None
            yield TaskScore(task, name, float(value), measured, None, int(samples), int(shots.get(task) or 0))


def _is_path(name: str) -> bool:
    """Return whether a name can only be that of a file or folder; a plain word is a task of lm-eval."""
    return "/" in name or name.endswith(ENDINGS) or name in (".", "..")


def _is_task(file: Path) -> bool:
    """Return whether a file has a task's key, and not a group's; its functions make it more than plain YAML."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    keys = {line.partition(":")[0].strip() for line in lines if line[:1].isalpha() and ":" in line}
    return "task" in keys and "group" not in keys


def _load_named(manager: Any, name: str) -> dict[str, Any]:
    matching = manager.match_tasks([name])
    if not matching:
        near = nearest(name, manager.all_tasks)
        raise UsageError(
            f"{name} is no task of lm-eval; did you mean {near}? `lm-eval ls tasks` lists them, and task files are "
            f"passed by their path, such as ./{name}.yaml."
        )
    try:
        return manager.load(matching)
    except ImportError as error:
        raise UsageError(
            f"the task {name} needs a package that is not installed ({first_line(error)}); install it, or leave the "
            "task out."
        ) from error
    except Exception as error:  # the hub, datasets and their HTTP libraries each raise kinds of their own
        raise ModelError(
            f"the data of the task {name} could not be read from the hub or its cache ({first_line(error)}); run this "
            f"once where the hub can be reached, or {OWN_DATA}."
        ) from error


def _load_file(manager: Any, file: Path) -> dict[str, Any]:
    """Return the tasks of a file; its data files are looked for from the current folder, then from the file's own."""
    place = file.resolve()
    try:
        try:
            return manager.load([str(place)])
        except FileNotFoundError:
            with contextlib.chdir(place.parent):
                return manager.load([str(place)])
    except Exception as error:
        raise UsageError(
            f"{file} cannot be used as a task ({type(error).__name__}: {first_line(error)}); a file in lm-eval's "
            "format with data that can be read is needed."
        ) from error


def _check_safe(name: str, task: Any) -> None:
    """Raise UsageError for a task that is not run here: one that executes what the model writes, or shows images."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"the task {name} runs programs that the model writes, which quantc does not do; leave it out, or run it "
            "by lm-eval's own command in a sandbox."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"the task {name} shows images, and tasks here are texts; leave it out.")


def _set_examples(task: Any, few_shot: int | None) -> None:
    """Set how many examples are shown, as lm-eval does: a task that says 0 itself has none."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config(key="num_fewshot", value=few_shot if few_shot is not None else own or 0)
    task.set_fewshot_seed(seed=EXAMPLES_SEED)


def _failed(names: str, error: Exception) -> UsageError:
    """Return the error for whatever lm-eval makes of a task's template, data or metric."""
    return UsageError(
        f"lm-eval failed on {names} ({type(error).__name__}: {first_line(error)}); a task whose templates fit its "
        "data is needed, so try each alone with --limit 1."
    )
