"""The commands that look at a result: eval, inspect, verify, report, doctor."""

import inspect
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from quantc import api
from quantc.checkpoint import reader
from quantc.checkpoint.config import PackedEntry
from quantc.errors import CheckpointError
from quantc.kernels.cpu import library
from quantc.kernels.cpu.native import NATIVE
from quantc.machine import compute_dtype
from quantc.report import Report, read_report
from quantc.runtime import doctor
from quantc.spec import QuantSpec
from tests.quantc.cli_runner import make_report, run


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    """A folder with a report."""
    make_report().write(tmp_path)
    return tmp_path


# eval


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces api.evaluate by one that records its arguments."""
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(api.evaluate)

    def evaluate(*args: Any, **settings: Any) -> Any:
        signature.bind(*args, **settings)
        del settings["progress"]
        seen.append({"model": args[0], **settings})
        compared = settings["against"] is not None
        figures = {
            "perplexity": 31.25,
            "perplexity_original": 28.69 if compared else None,
            "mean_kl": 0.0512 if compared else None,
            "p99_kl": float("inf") if compared else None,
            "top1_agreement": 0.912 if compared else None,
            "positions": 20440,
            "windows": 40,
            "bits_per_weight": 4.156,
            "weights_bytes": 112_000_000,
            "tokens_per_second": 41.4,
            "peak_rss_bytes": 900_000_000,
            "dtype": "float32",
            "dtype_reason": "this processor has no bfloat16 products",
        }
        if settings["text"] is None:
            figures |= {"perplexity": float("nan"), "positions": 0, "windows": 0}
        if settings["tasks"]:
            score = {"task": "arc_easy", "metric": "acc", "value": 0.5512, "standard_error": None, "samples": 2376}
            figures["tasks"] = [{**score, "original": 0.5633 if compared else None, "few_shot": 0}]
        return SimpleNamespace(to_dict=lambda: figures)

    monkeypatch.setattr(api, "evaluate", evaluate)
    return seen


def test_eval_passes_every_option_to_the_api(evaluations: list[dict[str, Any]]) -> None:
    words = "--text t.txt --against o --context 64 --stride 32 --windows 3 --dtype bfloat16 --device cuda"
    words += " --trust-remote-code --tasks arc_easy,./mine.yaml --limit 5 --few-shot 0"
    assert run("eval", "m", *words.split()).exit_code == 0
    assert evaluations == [
        {
            "model": "m", "text": "t.txt", "against": "o", "context": 64, "stride": 32, "windows": 3,
            "dtype": "bfloat16", "device": "cuda", "trust_remote_code": True,
            "tasks": ("arc_easy", "./mine.yaml"), "limit": 5, "few_shot": 0,
        }
    ]  # fmt: skip


def test_eval_shows_divergence_only_against_an_original(evaluations: list[dict[str, Any]]) -> None:
    alone = " ".join(run("eval", "m", "--text", "t.txt").stdout.split())
    assert alone.startswith(
        "perplexity 31.25 computed in float32 this processor has no bfloat16 products text 20,440 predictions in 40 "
        "windows bits per weight 4.156"
    )
    compared = " ".join(run("eval", "m", "--text", "t.txt", "--against", "orig").stdout.split())
    assert "perplexity 31.25 orig has 28.69" in compared
    assert "KL divergence 0.0512 mean, in nats; 99th percentile n/a" in compared
    assert "top-1 agreement 91.2 %" in compared


def test_eval_shows_tasks_alone_or_beside_an_original(evaluations: list[dict[str, Any]]) -> None:
    alone = " ".join(run("eval", "m", "--tasks", "arc_easy").stdout.split())
    assert alone.startswith("computed in float32 this processor has no bfloat16 products bits per weight 4.156")
    assert alone.endswith("Tasks task metric value standard error questions few-shot arc_easy acc 0.5512 n/a 2,376 0")
    compared = " ".join(run("eval", "m", "--tasks", "arc_easy", "--against", "o").stdout.split())
    assert compared.endswith("original questions few-shot arc_easy acc 0.5512 n/a 0.5633 2,376 0")
    content = json.loads(run("eval", "m", "--tasks", "arc_easy", "--json").stdout)
    assert content["perplexity"] is None
    assert content["tasks"][0]["value"] == 0.5512


def test_eval_json_has_no_infinity(evaluations: list[dict[str, Any]]) -> None:
    content = json.loads(run("eval", "m", "--text", "t.txt", "--against", "o", "--json").stdout)
    assert content["p99_kl"] is None
    assert content["perplexity"] == 31.25


# inspect, verify, report


def test_inspect_lists_every_linear_whole_and_the_totals(folder: Any) -> None:
    shown = run("inspect", str(folder)).stdout
    first = next(line for line in shown.splitlines() if "layers.1.mlp" in line)
    assert " ".join(first.split()) == "model.layers.1.mlp.up_proj w4g128 256 x 128 4.156 0.0100 gptq"
    assert "gptq+rtn (3 fallbacks, 2 dead inputs)" in shown
    assert "bits per weight" in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())


def test_inspect_json_is_the_table(folder: Any) -> None:
    content = json.loads(run("inspect", str(folder), "--json").stdout)
    assert len(content["linears"]) == 8
    assert content["linears"][0]["label"] == "w4g128"
    assert content["linears"][-1]["error"] is None


@pytest.mark.parametrize("command", ["inspect", "report"])
@pytest.mark.parametrize("content", ["{", "{}", '{"linears": [{}]}', "[]"])
def test_a_damaged_report_is_one_line(tmp_path: Any, command: str, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    result = run(command, str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "report.json" in result.stderr
    assert result.stderr.count("\n") == 1


def test_verify_says_what_was_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    found = reader.Verified(12, 3_000_000, ("tokenizer.json has changed",))
    monkeypatch.setattr(reader, "verify", lambda path: found)
    shown = run("verify", str(tmp_path)).stdout
    assert f"{tmp_path} is intact: 12 tensors, 3.00 MB" in shown
    assert shown.endswith("\nNote: tokenizer.json has changed.\n")
    content = json.loads(run("verify", str(tmp_path), "--json").stdout)
    assert content == {"checkpoint": str(tmp_path), "tensors": 12, "bytes": 3_000_000, "notes": list(found.notes)}


def test_verify_names_the_damaged_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def verify(path: Any) -> None:
        raise CheckpointError("the tensor w has changed since it was written; copy that file again.")

    monkeypatch.setattr(reader, "verify", verify)
    result = run("verify", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == "Error: the tensor w has changed since it was written; copy that file again.\n"


def test_report_writes_the_page_beside_the_report_or_where_told(folder: Any) -> None:
    assert run("report", str(folder)).stdout == f"Wrote {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    content = json.loads(run("report", str(folder), "-o", str(folder / "x.html"), "--json").stdout)
    assert content == {"checkpoint": str(folder), "report": str(folder / "x.html")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linears": {}}, "linears of the report is {}, and not a list of a mapping of a text to"),
        ({"linears": [3]}, "linears of the report is [3], and not"),
        ({"wall_seconds": float("inf")}, "wall_seconds of the report is inf, and not a finite number"),
        ({"weights_bytes": "many"}, "weights_bytes of the report is 'many', and not a whole number"),
        ({"expert_fallbacks": True}, "expert_fallbacks of the report is True, and not a whole number"),
        ({"notes": [1]}, "notes of the report is [1], and not a list of a text"),
        ({"rewrites": {"rotate": 3}}, "rewrites of the report is {'rotate': 3}, and not a mapping of a text to"),
        ({"shape": [0, 128]}, "model.layers.1.mlp.up_proj has the shape [0, 128] and 0 experts"),
        ({"shape": [256, 128, 4]}, "shape of model.layers.1.mlp.up_proj is [256, 128, 4], and not"),
        ({"spec": {"bits": 99}}, "bits is 99, but codes have 2 to 8 bits"),
        ({"name": None}, "name of None is None, and not a text"),
        ({"error": "big"}, "error of model.layers.1.mlp.up_proj is 'big', and not a finite number"),
        ({"bits_per_weight": 10**40}, "it has a whole number of more than 128 bits"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "report"])
def test_a_report_with_a_value_of_another_kind_is_one_line(
    folder: Any, command: str, changes: dict[str, Any], message: str
) -> None:
    report = make_report().to_dict()
    (report if next(iter(changes)) in report else report["linears"][0]).update(changes)
    (folder / "report.json").write_text(json.dumps(report))
    result = run(command, str(folder))
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_report_of_a_later_version_is_read(folder: Any) -> None:
    report = make_report().to_dict()
    report["linears"][0]["a key of the future"] = report["another one"] = 1
    (folder / "report.json").write_text(json.dumps(report))
    assert run("inspect", str(folder)).exit_code == 0
    assert Report.from_dict(read_report(folder)).linears[0] == make_report().linears[0]


def test_names_are_printed_as_they_are_and_command_no_terminal(folder: Any) -> None:
    report = make_report().to_dict()
    report["linears"][0]["name"] = "[/x] [red]a[/red] :smile: \x1b[31m\r\u202e"
    report["linears"][0]["method"] = "\x9b2J[link=http://a]"
    report["notes"] = ["\x1b]0;title\x07"]
    report["kept"] = {"\x1b[1mkept": "\x1bno"}
    (folder / "report.json").write_text(json.dumps(report))
    shown = run("inspect", str(folder)).stdout
    assert "[/x] [red]a[/red] :smile: \\x1b[31m\\r\\u202e" in shown
    assert "\\x9b2J[link=http://a]" in shown
    assert "\\x1b]0;title\\x07" in shown
    assert "\\x1b[1mkept  \\x1bno" in shown
    assert all(char.isprintable() or char == "\n" for char in shown)
    run("report", str(folder))
    page = (folder / "report.html").read_text()
    assert "\\x1b]0;title\\x07" in page
    assert all(char.isprintable() or char == "\n" for char in page)


def test_what_a_terminal_s_encoding_lacks_is_an_escape(folder: Any) -> None:
    report = make_report().to_dict()
    report["notes"] = ["äö"]
    (folder / "report.json").write_text(json.dumps(report))
    command = [sys.executable, "-c", "from quantc.cli import main; main()", "inspect", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "\\xe4\\xf6" in finished.stdout


def test_report_to_a_folder_that_does_not_exist_is_one_line(folder: Any) -> None:
    result = run("report", str(folder), "-o", str(folder / "no" / "x.html"))
    assert result.exit_code == 1
    assert result.stderr == f"Error: No such file or directory: {folder / 'no' / 'x.html'}.\n"


# doctor


def test_doctor_describes_the_machine() -> None:
    machine = json.loads(run("doctor", "--json").stdout)["machine"]
    assert {
        "quantc",
        "torch",
        "transformers",
        "python",
        "cpu",
        "cpu features",
        "threads",
        "memory",
    } <= machine.keys()
    assert machine["cuda"].endswith(".")
    assert "torch" in run("doctor").stdout


def test_doctor_groups_equal_linears_and_says_why_kernels_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    entries = {f"layers.{i}.up": PackedEntry(QuantSpec(4, 96), (768, 288)) for i in range(3)}
    entries["layers.0.down"] = PackedEntry(QuantSpec(3, 64), (288, 768))
    reader = SimpleNamespace(entries=entries, config={"dtype": "bfloat16"}, folder=tmp_path, slices=dict)
    monkeypatch.setattr(doctor, "CheckpointReader", lambda path: reader)
    monkeypatch.setattr(library, "load", lambda: "was not built")
    for multiplied, computed in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(compute_dtype, "multiplies", lambda _, multiplied=multiplied: multiplied)
        facts = json.loads(run("doctor", str(tmp_path), "--json").stdout)
        assert facts["dtype"] == computed
    assert [group["count"] for group in facts["linears"]] == [3, 1]
    assert facts["linears"][0]["names"] == ["layers.0.up", "layers.1.up", "layers.2.up"]
    assert facts["linears"][1]["refused"]["torch-int4"] == "needs 4 bits, not 3"
    shown = run("doctor", str(tmp_path), "--dtype", "float32").stdout
    assert f"Kernels for {tmp_path} in float32 on cpu" in shown
    assert re.search(r"3  w4g96 +768 x 288  reference ", shown)
    assert "native was not built" in shown
    assert "torch-int4 is fast in bfloat16 only" in shown


def test_doctor_says_what_the_native_cpu_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: "was not built")
    missing = "Not ready: the native CPU kernel was not built. torch runs everything."
    assert doctor.examine_machine()["cpu kernels"] == missing
    monkeypatch.undo()
    if isinstance(library.load(), str):
        pytest.skip(f"the native kernel {library.load()}")
    assert doctor.describe_cpu_kernels().endswith("Activations keep their dtype.")
    monkeypatch.setattr(NATIVE, "int8", True)
    said = doctor.describe_cpu_kernels()
    assert said.startswith(f"Ready: uses {library.level()} of scalar")
    assert said.endswith("Activations are rounded to int8, as QUANTC_CPU_INT8 asks.")


def test_doctor_refuses_an_unknown_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(doctor, "CheckpointReader", lambda path: SimpleNamespace())
    result = run("doctor", str(tmp_path), "--device", "gpu7")
    assert result.exit_code == 2
    assert result.stderr == "Error: the device 'gpu7' is unknown; pass cpu, cuda, or cuda:0 and so on.\n"
