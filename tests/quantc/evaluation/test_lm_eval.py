"""Tasks run by lm-eval itself, from local files: its scores are those that the model's logits give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.errors import ModelError, UsageError
from quantc.evaluation.tasks import TaskScore
from quantc.frontend import open_model
from quantc.frontend.auto import read_tokenizer
from tests.families import build
from tests.helpers import quantize_saved, save_with_tokenizer, tiny_text

pytest.importorskip("lm_eval", reason="lm-eval is not installed; `pip install lm-eval` into this environment")
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = 6
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{{question}}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its checkpoint, and a folder with a task whose data is beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    save_with_tokenizer(build("llama"), folder / "model")
    quantize_saved(folder, bits=4, group_size=8, method="rtn")
    (folder / "tasks").mkdir()
    write_task(folder / "tasks/mine.yaml")
    rows = [
        {"question": tiny_text(8, 3 * row), "choices": [tiny_text(1 + way, 50 + 9 * row + way) for way in range(3)]}
        for row in range(QUESTIONS)
    ]
    lines = [json.dumps({**row, "answer": at % 3}) for at, row in enumerate(rows)]
    (folder / "tasks/data.jsonl").write_text("\n".join(lines))
    return folder


def write_task(file: Path, data: str = "data.jsonl", question: str = "question", kind: str = "multiple_choice") -> None:
    text = TASK.format(name=file.stem, data=data, question=question, kind=kind)
    file.write_text(text, encoding="utf-8")


def accuracy(model: Any, folder: Path, questions: int) -> float:
    """Count the questions whose right answer is the likeliest."""
    tokenizer = read_tokenizer(folder / "model")
    right = 0
    for line in (folder / "tasks/data.jsonl").read_text().splitlines()[:questions]:
        row = json.loads(line)
        context = tokenizer(row["question"])["input_ids"]
        found = []
        for choice in row["choices"]:
            tokens = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                scores = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            found.append(sum(float(scores[at - 1, tokens[at]]) for at in range(len(context), len(tokens))))
        right += int(torch.tensor(found).argmax()) == row["answer"]
    return right / questions


def test_a_checkpoint_scores_what_its_logits_say(folder: Path) -> None:
    found = quantc.evaluate(folder / "packed", tasks=[str(folder / "tasks")], against=folder / "model", dtype="float32")
    packed = quantc.load(folder / "packed", dtype=torch.float32)
    original = open_model(folder / "model").load_whole(torch.float32)
    expected = [accuracy(model, folder, QUESTIONS) for model in (packed, original)]
    (row,) = found.tasks
    assert (row.value, row.original) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert (row.task, row.metric, row.samples, row.few_shot) == ("mine", "acc", QUESTIONS, 0)
    assert row.standard_error is not None
    assert (found.windows, found.mean_kl) == (0, None)
    assert found.perplexity != found.perplexity
    assert found.to_dict()["tasks"][0]["task"] == "mine"


def test_the_first_questions_beside_a_text(folder: Path) -> None:
    found = quantc.evaluate(
        folder / "packed", text=str(folder / "model/text.txt"), tasks=[str(folder / "tasks/mine.yaml")],
        limit=4, few_shot=1, context=16, windows=2,
    )  # fmt: skip
    (row,) = found.tasks
    assert isinstance(row, TaskScore)
    assert (row.samples, row.few_shot, row.original) == (4, 1, None)
    assert found.windows == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": "nowhere.jsonl"}, "cannot be used as a task (FileNotFoundError: Unable to find"),
        ({"kind": "guessing"}, "cannot be used as a task ("),
        ({"question": "question.missing()"}, "cannot be used as a task (UndefinedError: 'str object' has no"),
        ({"question": "question if answer == 0 else question.no()"}, "lm-eval failed on broken (UndefinedError: 'str"),
    ],
)
def test_a_broken_task_is_told_in_a_sentence(folder: Path, tmp_path: Path, settings: dict[str, str], said: str) -> None:
    write_task(tmp_path / "broken.yaml", **{"data": str(folder / "tasks/data.jsonl"), **settings})
    with pytest.raises(UsageError) as caught:
        quantc.evaluate(folder / "packed", tasks=[str(tmp_path / "broken.yaml")], dtype="float32")
    assert said in str(caught.value)


def test_a_task_of_the_hub_out_of_reach(folder: Path) -> None:
    with pytest.raises(ModelError, match="the data of the task arc_easy could not be read"):
        quantc.evaluate(folder / "packed", tasks=["arc_easy"])
