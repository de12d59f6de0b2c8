"""Tasks: what is wrong with them is told in a sentence before a model is loaded; their scores become a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from quantc import api
from quantc.errors import CalibrationError, ModelError, UsageError
from quantc.evaluation import harness
from quantc.evaluation.evaluate import Asked
from quantc.evaluation.harness import Bars, batch_rows
from quantc.evaluation.tasks import Tasks, TaskScore, rows_of, task_files

KNOWN = ["arc_easy", "hellaswag"]
TASK = "task: mine\ndataset_path: json\n"


class FakeTask:
    """What quantc asks of a task of lm-eval."""

    def __init__(self, **settings: Any):
        self.settings = settings
        self.seed = 0

    def get_config(self, key: str) -> Any:
        return self.settings.get(key)

    def set_config(self, key: str, value: Any) -> None:
        self.settings[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.seed = seed


class FakeManager:
    """Knows two tasks; `load` is what the test says."""

    load: Callable[..., Any]
    all_tasks = KNOWN

    def __init__(self, include_defaults: bool):
        assert include_defaults or self is not None

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in KNOWN]


class FakeHFLM:
    """Computes what its model does."""

    def __init__(self, pretrained: Any, **settings: Any):
        self.model, self.settings = pretrained, settings

    def _model_call(self, tokens: Any) -> Any:
        return self.model(tokens)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> type[FakeManager]:
    """A lm-eval of a few names; returns its task manager."""
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "datasets")}
    modules |= {name: ModuleType(name) for name in ("lm_eval.models.huggingface", "lm_eval.evaluator")}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, module)
        if parent:
            setattr(modules[parent], child, module)
    manager = type("Manager", (FakeManager,), {})
    vars(modules["lm_eval.tasks"])["TaskManager"] = manager
    vars(modules["lm_eval.models.huggingface"]).update(HFLM=FakeHFLM, tqdm=None)
    vars(modules["datasets"]).update(
        are_progress_bars_disabled=lambda: True, disable_progress_bars=lambda: None, enable_progress_bars=lambda: None
    )
    monkeypatch.setattr(harness, "version", lambda _: harness.LEAST)
    return manager


def loading(manager: type[FakeManager], result: Any) -> None:
    def load(_: Any, names: list[str]) -> Any:
        if isinstance(result, Exception):
            raise result
        return {"tasks": {name: result for name in names}, "groups": {}}

    manager.load = load


def refusal(*names: str) -> str:
    with pytest.raises((UsageError, ModelError)) as caught:
        Tasks(names)
    return str(caught.value)


def test_a_package_that_is_missing_or_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", missing)
    message = "--tasks needs the package lm-eval, which is not installed; run `pip install lm-eval`."
    with pytest.raises(UsageError) as caught:
        api.evaluate("nowhere", tasks=["arc_easy"])  # told before the model is looked for
    assert str(caught.value) == message
    monkeypatch.setattr(harness, "version", lambda _: "0.4.9.1")
    assert refusal("arc_easy") == (
        "lm-eval 0.4.9.1 is installed, and --tasks needs 0.4.13 or newer; run `pip install --upgrade lm-eval`."
    )


def test_an_unknown_task_brings_the_nearest(lm_eval: type[FakeManager]) -> None:
    assert refusal("arc_eazy").startswith("arc_eazy is no task of lm-eval; did you mean arc_easy? `lm-eval ls tasks`")


def test_data_out_of_reach_points_to_local_files(lm_eval: type[FakeManager]) -> None:
    loading(lm_eval, ConnectionError("Couldn't reach the Hub\nmore"))
    assert refusal("arc_easy") == (
        "the data of the task arc_easy could not be read from the hub or its cache (Couldn't reach the Hub); run this "
        "once where the hub can be reached, or pass a task file whose data is on this machine."
    )
    loading(lm_eval, ModuleNotFoundError("No module named 'langdetect'"))
    assert "needs a package that is not installed (No module named 'langdetect')" in refusal("arc_easy")


def test_tasks_that_run_code_or_show_images_are_refused(lm_eval: type[FakeManager]) -> None:
    task = FakeTask()
    vars(task)["UNSAFE_CODE"] = True
    loading(lm_eval, task)
    assert refusal("arc_easy").startswith("the task arc_easy runs programs that the model writes")
    task = FakeTask()
    vars(task)["MULTIMODAL"] = True
    loading(lm_eval, task)
    assert refusal("arc_easy").startswith("the task arc_easy shows images")


@pytest.mark.parametrize(("own", "asked", "expected"), [(None, None, 0), (5, None, 5), (5, 2, 2), (0, 2, 0)])
def test_examples_are_as_many_as_asked_where_the_task_has_any(
    lm_eval: type[FakeManager], own: int | None, asked: int | None, expected: int
) -> None:
    task = FakeTask(num_fewshot=own)
    loading(lm_eval, task)
    Tasks(["arc_easy"], few_shot=asked)
    assert task.get_config("num_fewshot") == expected
    assert task.seed == 1234


def test_a_damaged_task_file_is_named(lm_eval: type[FakeManager], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(TASK)
    loading(lm_eval, KeyError("output_type"))
    message = f"{file} cannot be used as a task (KeyError: 'output_type'); a file in lm-eval's format with data that"
    assert refusal(str(file)).startswith(message)


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no task file; a .yaml file with the key task"):
        task_files(tmp_path)
    with pytest.raises(UsageError, match=r"there is no task file .*nowhere.yaml; check the path"):
        task_files(tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_text(TASK)
    (tmp_path / "a.yml").write_text(f"include: defaults.yaml\n{TASK}process_docs: !function code.process\n")
    (tmp_path / "defaults.yaml").write_text("metric_list:\n  - task: none\n")
    (tmp_path / "group.yaml").write_text("group: both\ntask:\n  - mine\n")
    (tmp_path / "data.json").write_text('{"task": 1}')
    assert [file.name for file in task_files(tmp_path)] == ["a.yml", "b.yaml"]
    assert task_files(tmp_path / "b.yaml") == [tmp_path / "b.yaml"]


def test_rows_are_the_metrics_that_are_numbers() -> None:
    results = {
        "results": {
            "mine": {"alias": "mine", "sample_len": 7, "acc,none": 0.5, "acc_stderr,none": 0.1, "note,none": "x"},
            "maths": {"exact_match,strict": 1, "exact_match_stderr,strict": "N/A"},
        },
        "groups": {"both": {"acc,none": 0.25, "sample_len": 9}},
        "n-samples": {"mine": {"original": 100, "effective": 20}},
        "n-shot": {"mine": 5},
    }
    assert list(rows_of(results)) == [
        TaskScore("mine", "acc", 0.5, 0.1, None, 20, 5),
        TaskScore("maths", "exact_match (strict)", 1.0, None, None, 0, 0),
        TaskScore("both", "acc", 0.25, None, None, 9, 0),
    ]


def test_a_model_that_computes_nan_is_refused(lm_eval: type[FakeManager]) -> None:
    def model(tokens: torch.Tensor) -> torch.Tensor:
        return tokens / tokens

    vars(model)["config"] = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))
    language_model = harness.as_language_model(model, None)
    assert language_model.settings["softmax_dtype"] == "float32"
    assert torch.equal(language_model._model_call(torch.ones(2)), torch.ones(2))
    with pytest.raises(CalibrationError, match="the logits of the model are NaN or infinite in a task"):
        language_model._model_call(torch.zeros(2))


def test_logits_of_a_batch_fit_into_256_mib() -> None:
    assert [batch_rows(size) for size in (160, 49_152, 262_144, 10**9)] == [16, 5, 1, 1]


class Recorder:
    def __init__(self) -> None:
        self.told: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.told.append(f"{name} {total}")

    def step(self, name: str) -> None:
        self.told.append(name)

    def linear(self, name: str, error: float) -> None: ...

    def note(self, text: str) -> None: ...

    def done(self) -> None:
        self.told.append("done")


def test_bars_become_a_hundred_steps_and_inner_ones_are_silent() -> None:
    progress = Recorder()
    bars = Bars(progress)
    bar = bars(total=1000, desc="requests")
    for _ in range(500):
        bar.update(2)
        bars(total=3).update()
    bar.close()
    assert progress.told[:2] == ["tasks 100", "10 of 1,000 requests"]
    assert progress.told[-2:] == ["1,000 of 1,000 requests", "done"]
    assert len(progress.told) == 102
    progress.told.clear()
    assert list(bars(["a", "b"], disable=False)) == ["a", "b"]
    assert progress.told == ["tasks 2", "1 of 2 requests", "2 of 2 requests", "done"]
    assert list(Bars(None)(["a"])) == ["a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says what to measure; pass --text, --tasks, or both."),
        ({"tasks": ["t"], "windows": 2}, "--windows belongs to --text, which is missing; pass --text too."),
        ({"text": "t", "few_shot": 2}, "--few-shot belongs to --tasks, which is missing; pass --tasks too."),
    ],
)
def test_what_is_measured_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Asked(**{"text": None, **settings})
    assert str(caught.value) == message
