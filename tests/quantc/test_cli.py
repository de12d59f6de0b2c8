"""The command line against a stand-in for the api: options, streams, messages and exit codes."""

import errno
import inspect
import io
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from quantc import api, checkpoint
from quantc.cli import main
from quantc.console import to_plain
from quantc.errors import CheckpointError, ModelError, UsageError
from quantc.live import LiveProgress
from quantc.recipe import DEFAULT
from quantc.report import LinearReport, Report
from quantc.spec import QuantSpec
from quantc.units import clock, duration, number, size


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="quantc")


def make_report(output: str = "tiny-w4") -> Report:
    spec = QuantSpec(4, 128)
    linears = [
        LinearReport(
            f"model.layers.{block}.mlp.up_proj", spec, (256, 128), 0, 4.156, 0.01 * block, "gptq", 99
        )
        for block in range(1, 8)
    ]
    stack = LinearReport("model.layers.8.experts", spec, (64, 128), 4, 4.2, float("nan"), "gptq+rtn", 9, 3)
    return Report(
        model="tiny",
        output=output,
        linears=[*linears, stack],
        kept={"model.layers.1.router": "a router decides, it does not multiply", "lm_head": "tied"},
        notes=["group size 64: 128 does not divide 192"],
        weights_bytes=2_500_000,
        source_bytes=10_000_000,
        calibration="builtin, 64 x 512 tokens",
        cpu_seconds=120.0,
        wall_seconds=65.0,
        peak_rss_bytes=1_400_000_000,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces api.quantize by one that records its arguments, makes noise, and returns a report."""
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(api.quantize)

    def quantize(*args: Any, **settings: Any) -> Report:
        signature.bind(*args, **settings)
        progress = settings.pop("progress")
        seen.append({"model": args[0], **settings})
        print("a library that prints")
        logging.getLogger("quantc").warning("group size 64 instead of 128")
        progress.stage("Quantizing", 2)
        progress.linear("model.layers.0.mlp.up_proj", 0.0123)
        progress.step("model.layers.0")
        progress.done()
        return make_report()

    monkeypatch.setattr(api, "quantize", quantize)
    return seen


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes api.quantize raise."""

    def set_error(error: BaseException) -> None:
        def quantize(*args: Any, **settings: Any) -> Report:
            raise error

        monkeypatch.setattr(api, "quantize", quantize)

    return set_error


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    """A folder with a report."""
    make_report().write(tmp_path)
    return tmp_path


# Start-up


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'rich', 'yaml', 'psutil'}"
    code = f"import sys, quantc.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def test_help_answers_in_under_half_a_second() -> None:
    command = [sys.executable, "-c", "from quantc.cli import main; main()", "quantize", "--help"]
    times = []
    for _ in range(5):  # the best of five, since other work may share the machine
        start = time.perf_counter()
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
        times.append(time.perf_counter() - start)
    assert "--group-size" in finished.stdout
    assert min(times) < 0.5


def test_help_lists_commands_in_the_order_of_use() -> None:
    shown = run("--help").stdout
    places = [
        shown.index(f"\n  {name} ") for name in ("quantize", "eval", "inspect", "verify", "doctor", "report")
    ]
    assert places == sorted(places)
    assert run().stdout == shown


@pytest.mark.parametrize("command", list(main.commands))
def test_every_option_has_one_line_of_help_and_every_command_an_example(command: str) -> None:
    shown = run(command, "--help").stdout
    assert f"Example: quantc {command} " in shown
    for parameter in main.commands[command].params:
        if parameter.param_type_name == "option":
            assert getattr(parameter, "help", None), parameter.name


def test_defaults_in_the_help_are_those_of_the_recipe() -> None:
    stated = {option.name: getattr(option, "help", "") for option in main.commands["quantize"].params}
    data = DEFAULT.calibration
    for name, value in (("samples", data.samples), ("seq_len", data.seq_len), ("seed", data.seed)):
        assert f"[default: {value}]" in stated[name]
    assert f"[default: {data.source}]" in stated["calib"]
    assert f"[default: {dict(DEFAULT.passes)['quantize'].method}]" in stated["method"]
    assert not dict(DEFAULT.passes)["allocate"].symmetric
    assert "[default: asymmetric]" in stated["symmetric"]


def test_version() -> None:
    assert re.fullmatch(r"quantc \d+\.\d+\.\d+\n", run("--version").stdout)


# quantize


def test_quantize_passes_every_option_to_the_api(calls: list[dict[str, Any]], tmp_path: Any) -> None:
    recipe, plan = tmp_path / "r.yaml", tmp_path / "p.yaml"
    recipe.write_text("")
    plan.write_text("")
    words = "--bits 3 -o out --group-size -1 --method rtn --symmetric --head-bits 8 --calib a.txt --samples 4"
    more = f"--seq-len 64 --seed 7 --recipe {recipe} --plan {plan} --device cuda --force"
    assert run("quantize", "tiny", *words.split(), *more.split()).exit_code == 0
    assert calls == [
        {
            "model": "tiny", "bits": 3, "out": "out", "group_size": -1, "method": "rtn", "symmetric": True,
            "head_bits": 8, "calib": "a.txt", "samples": 4, "seq_len": 64, "seed": 7, "recipe": recipe,
            "plan": plan, "device": "cuda", "force": True,
        }
    ]  # fmt: skip


def test_options_left_out_are_left_to_the_api(calls: list[dict[str, Any]]) -> None:
    run("quantize", "tiny", "--bits", "4")
    given = {name: value for name, value in calls[0].items() if value is not None}
    assert given == {"model": "tiny", "bits": 4, "device": "cpu", "force": False}


def test_summary_tells_what_was_written_and_what_to_do_next(calls: list[dict[str, Any]]) -> None:
    result = run("quantize", "tiny", "--bits", "4")
    shown = " ".join(result.stdout.split())
    assert shown.startswith("Wrote tiny-w4 bits per weight 4.")
    assert "2.50 MB 0.250 of the source's 10.0 MB" in shown
    assert "experts 3 saw too few calibration rows" in shown
    assert "1 min 05 s 2 min 00 s of CPU time" in shown
    assert "peak memory 1.40 GB" in shown
    assert "Largest errors model.layers.8.experts w4g128 n/a gptq+rtn model.layers.7.mlp" in shown
    assert "model.layers.2.mlp" not in shown
    assert "lm_head tied" in shown
    assert "group size 64: 128 does not divide 192" in shown
    assert shown.endswith("Next quantc eval tiny-w4 --against tiny --text wikitext2")


def test_the_next_command_is_never_broken(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    last = run("quantize", "a model/with a long name", "--bits", "4").stdout.splitlines()[-1]
    assert last == "  quantc eval tiny-w4 --against 'a model/with a long name' --text wikitext2"


def test_progress_is_log_lines_on_stderr_where_there_is_no_terminal(calls: list[dict[str, Any]]) -> None:
    result = run("quantize", "tiny", "--bits", "4")
    assert re.search(r"^\d\d:\d\d:\d\d Quantizing 1/2 model.layers.0$", result.stderr, re.MULTILINE)
    assert "a library that prints" in result.stderr
    assert "library" not in result.stdout
    assert "0.0123" not in result.stderr
    assert "0.0123" in run("quantize", "tiny", "--bits", "4", "--verbose").stderr


def test_quiet_says_nothing_but_errors(calls: list[dict[str, Any]]) -> None:
    result = run("quantize", "tiny", "--bits", "4", "--quiet")
    assert result.stdout == ""
    assert "Quantizing" not in result.stderr
    assert "group size" not in result.stderr


def test_json_is_one_object_on_stdout(calls: list[dict[str, Any]]) -> None:
    result = run("quantize", "tiny", "--bits", "4", "--json")
    content = json.loads(result.stdout)
    wanted = {"output", "bits_per_weight", "weights_bytes", "cpu_seconds", "wall_seconds", "peak_rss_bytes"}
    assert wanted <= content.keys()
    assert "Quantizing 1/2" in result.stderr


def test_the_log_is_left_as_it_was(calls: list[dict[str, Any]]) -> None:
    logger = logging.getLogger("quantc")
    before = (logger.level, list(logger.handlers), logger.propagate)
    run("quantize", "tiny", "--bits", "4")
    assert (logger.level, list(logger.handlers), logger.propagate) == before


# Wrong usage: one line, exit code 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("quantize m", "--bits is missing; pass 2 to 8 bits per code, or a --recipe or --plan."),
        ("quantize m --bits 9", "--bits is 9, but must be a whole number from 2 to 8."),
        ("quantize m -b 1", "--bits is 1, but must be a whole number from 2 to 8."),
        ("quantize m --bits 3.5", "--bits is 3.5, but must be a whole number from 2 to 8."),
        ("quantize m --bits four", "--bits is four, but must be a whole number from 2 to 8."),
        ("quantize m --bits 4 --samples 0", "--samples is 0, but must be a whole number of 1 or more."),
        ("quantize m --bitz 4", "No such option --bitz; did you mean --bits? See `quantc quantize --help`."),
        ("quantize m --bits 4 --method awq", "'awq' is not one of 'gptq', 'rtn'."),
        ("quantize m --recipe nowhere.yaml", "File 'nowhere.yaml' does not exist."),
        ("quantize", "Missing argument 'MODEL'."),
        ("quantise m", "No such command 'quantise'; did you mean quantize? See `quantc --help`."),
        ("frobnicate", "No such command 'frobnicate'; known are quantize, eval,"),
        ("eval m", "Missing option '--text'."),
        ("eval m --text t.txt --dtype int8", "'int8' is not one of 'float32', 'bfloat16', 'float16'."),
        ("inspect nowhere", "nowhere is no folder; pass a checkpoint that `quantc quantize` wrote."),
        ("verify nowhere", "nowhere is no folder;"),
        ("report nowhere", "nowhere is no folder;"),
        ("doctor nowhere", "nowhere is no folder;"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words: str, message: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


# Failures: one line, no traceback


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelError("the tensor w has\n  3 NaNs"), 1, "Error: the tensor w has 3 NaNs\n"),
        (UsageError("samples is 0"), 2, "Error: samples is 0\n"),
        (OSError(errno.EACCES, "Permission denied", "/out"), 1, "Error: Permission denied: /out.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "Error: No space left on device; free some space",
        ),
        (MemoryError(), 1, "Error: out of memory; free some, or pass fewer --samples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Error: out of memory;"),
    ],
)
def test_a_failure_is_one_line(
    fail_with: Callable[[BaseException], None], error: BaseException, code: int, message: str
) -> None:
    fail_with(error)
    result = run("quantize", "tiny", "--bits", "4", "--json")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_an_interrupt_is_one_line_and_exit_code_130(fail_with: Callable[[BaseException], None]) -> None:
    fail_with(KeyboardInterrupt())
    result = run("quantize", "tiny", "--bits", "4")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Error: interrupted."


def test_a_bug_is_not_disguised(fail_with: Callable[[BaseException], None]) -> None:
    fail_with(RuntimeError("shapes do not match"))
    assert isinstance(run("quantize", "tiny", "--bits", "4").exception, RuntimeError)


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
        }
        return SimpleNamespace(to_dict=lambda: figures)

    monkeypatch.setattr(api, "evaluate", evaluate)
    return seen


def test_eval_passes_every_option_to_the_api(evaluations: list[dict[str, Any]]) -> None:
    words = "--text t.txt --against o --context 64 --stride 32 --windows 3 --dtype bfloat16 --device cuda"
    assert run("eval", "m", *words.split()).exit_code == 0
    assert evaluations == [
        {
            "model": "m", "text": "t.txt", "against": "o", "context": 64, "stride": 32, "windows": 3,
            "dtype": "bfloat16", "device": "cuda",
        }
    ]  # fmt: skip


def test_eval_shows_divergence_only_against_an_original(evaluations: list[dict[str, Any]]) -> None:
    alone = " ".join(run("eval", "m", "--text", "t.txt").stdout.split())
    assert alone.startswith("perplexity 31.25 text 20,440 predictions in 40 windows bits per weight 4.156")
    compared = " ".join(run("eval", "m", "--text", "t.txt", "--against", "orig").stdout.split())
    assert "perplexity 31.25 orig has 28.69" in compared
    assert "KL divergence 0.0512 mean, in nats; 99th percentile n/a" in compared
    assert "top-1 agreement 91.2 %" in compared


def test_eval_json_has_no_infinity(evaluations: list[dict[str, Any]]) -> None:
    content = json.loads(run("eval", "m", "--text", "t.txt", "--against", "o", "--json").stdout)
    assert content["p99_kl"] is None
    assert content["perplexity"] == 31.25


# inspect, verify, report


def test_inspect_lists_every_linear_whole_and_the_totals(folder: Any) -> None:
    shown = run("inspect", str(folder)).stdout
    first = next(line for line in shown.splitlines() if "layers.1.mlp" in line)
    assert " ".join(first.split()) == "model.layers.1.mlp.up_proj w4g128 256 x 128 4.156 0.0100 gptq"
    assert "gptq+rtn (3 fallbacks)" in shown
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
    monkeypatch.setattr(checkpoint, "verify", lambda path: checkpoint.Verified(12, 3_000_000))
    assert f"{tmp_path} is intact: 12 tensors, 3.00 MB" in run("verify", str(tmp_path)).stdout
    content = json.loads(run("verify", str(tmp_path), "--json").stdout)
    assert content == {"checkpoint": str(tmp_path), "tensors": 12, "bytes": 3_000_000}


def test_verify_names_the_damaged_tensor(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def verify(path: Any) -> None:
        raise CheckpointError("the tensor w has changed since it was written; copy that file again.")

    monkeypatch.setattr(checkpoint, "verify", verify)
    result = run("verify", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == "Error: the tensor w has changed since it was written; copy that file again.\n"


def test_report_writes_the_page_beside_the_report_or_where_told(folder: Any) -> None:
    assert run("report", str(folder)).stdout == f"Wrote {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    content = json.loads(run("report", str(folder), "-o", str(folder / "x.html"), "--json").stdout)
    assert content == {"checkpoint": str(folder), "report": str(folder / "x.html")}


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
    from quantc import doctor
    from quantc.checkpoint import PackedEntry

    entries = {f"layers.{i}.up": PackedEntry(QuantSpec(4, 96), (768, 288)) for i in range(3)}
    entries["layers.0.down"] = PackedEntry(QuantSpec(3, 64), (288, 768))
    reader = SimpleNamespace(entries=entries, config={"dtype": "bfloat16"})
    monkeypatch.setattr(doctor, "CheckpointReader", lambda path: reader)
    facts = json.loads(run("doctor", str(tmp_path), "--json").stdout)
    assert facts["dtype"] == "bfloat16"
    assert [group["count"] for group in facts["linears"]] == [3, 1]
    assert facts["linears"][0]["names"] == ["layers.0.up", "layers.1.up", "layers.2.up"]
    assert facts["linears"][1]["refused"]["torch-int4"] == "needs 4 bits, not 3"
    shown = run("doctor", str(tmp_path), "--dtype", "float32").stdout
    assert f"Kernels for {tmp_path} in float32 on cpu" in shown
    assert re.search(r"3  w4g96 +768 x 288  reference +torch-int4 is fast in bfloat16 only", shown)


def test_doctor_refuses_an_unknown_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from quantc import doctor

    monkeypatch.setattr(doctor, "CheckpointReader", lambda path: SimpleNamespace(entries={}, config={}))
    result = run("doctor", str(tmp_path), "--device", "gpu7")
    assert result.exit_code == 2
    assert result.stderr == "Error: the device 'gpu7' is unknown; pass cpu, cuda, or cuda:0 and so on.\n"


# The terminal


def test_live_progress_shows_stage_steps_linear_times_and_memory() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    with LiveProgress(screen) as progress:
        progress.stage("Quantizing", 4)
        progress.linear("model.layers.0.mlp.up_proj", 0.01234)
        progress.step("model.layers.0")
        progress.linear("model.layers.1.mlp.up_proj", 0.02468)
        with screen.capture() as capture:
            screen.print(progress)
    shown = capture.get()
    assert "✓ opening the model" in shown
    assert re.search(r"Quantizing .* 1/4 0:00 elapsed  0:00 left [\d.]+ [MG]B memory", shown)
    assert "model.layers.1.mlp.up_proj   error 0.0247" in shown


def test_live_progress_ends_cleanly_when_the_run_fails() -> None:
    stream = io.StringIO()
    with (
        pytest.raises(ModelError),
        LiveProgress(Console(file=stream, force_terminal=True, width=90)) as progress,
    ):
        progress.stage("Quantizing", 4)
        raise ModelError("no")
    assert stream.getvalue().endswith("\x1b[?25h\n")  # the cursor is shown again
    assert "4/4" not in stream.getvalue()


# Wording


def test_json_values_are_plain(tmp_path: Any) -> None:
    value = {"a": float("nan"), "b": (1, float("-inf")), "c": tmp_path, 4: True}
    assert to_plain(value) == {"a": None, "b": [1, None], "c": str(tmp_path), "4": True}


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (size(999), "999 B"), (size(112_345_678), "112 MB"), (size(1_999_999), "2.00 MB"),
        (size(25.3e9), "25.3 GB"), (duration(4.25), "4.2 s"),
        (duration(59.99), "1 min 00 s"), (duration(7620), "2 h 07 min"),
        (clock(185), "3:05"), (clock(7620), "2:07:00"),
        (number(4.15625, 4), "4.156"), (number(0.00123456), "0.00123"), (number(123456.0), "123456"),
        (number(1.5e-9), "1.50e-09"), (number(0), "0"), (number(float("nan")), "n/a"), (number(None), "n/a"),
    ],
)  # fmt: skip
def test_figures_read_well(shown: str, wanted: str) -> None:
    assert shown == wanted
