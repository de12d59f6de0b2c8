"""The command line's start-up, `quantize`, and every way to fail, against a stand-in for the api."""

import errno
import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantc import api
from quantc.cli import main
from quantc.errors import ModelError, UsageError
from quantc.recipe import DEFAULT
from quantc.report import Report
from tests.helpers import thinned
from tests.quantc.cli_runner import make_report, run


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


# Start-up


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'rich', 'yaml', 'psutil', 'matplotlib'}"
    code = f"import sys, quantc.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "quantc", "targets", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "quantc targets" in finished.stdout


def test_help_loads_nothing_heavy() -> None:
    """Half a second of nothing is what importing torch for a help text feels like."""
    watch = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    command = [sys.executable, "-c", f"{watch}\nfrom quantc.cli import main; main()", "quantize", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "--group-size" in finished.stdout
    loaded = set(finished.stderr.split())
    assert "quantc.cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "scipy", "rich", "safetensors"}


def test_help_lists_commands_in_the_order_of_use() -> None:
    shown = run("--help").stdout
    places = [shown.index(f"\n  {name} ") for name in ("quantize", "eval", "compare", "check", "inspect", "report")]
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
    words = "--bits 3 --avg-bits 3.25 -o out --group-size -1 --method rtn --symmetric --head-bits 8 --calib a.txt"
    target = "--code auto --like Q4_K_M --max-kl 0.05 --max-ppl-increase 2% --text held.txt"
    budget = (
        "--size 300MiB --pin *.0.*=8 --pin *.v_proj=4 --formats w4g128,w8g128 --target vllm --search 5 --sparsity 2:4"
        " --tune-steps 20 --tune-budget 10min"
    )
    more = f"--samples 4 --seq-len 64 --seed 7 --preset best --recipe {recipe} --plan {plan} --device cuda"
    words += " --force --resume --trust-remote-code"
    assert run("quantize", "tiny", *words.split(), *budget.split(), *target.split(), *more.split()).exit_code == 0
    assert calls == [
        {
            "max_kl": 0.05, "max_ppl_increase": 0.02, "text": "held.txt",
            "sparsity": "2:4", "tune_steps": 20, "tune_budget": "10min",
            "size": "300MiB", "pins": {"*.0.*": 8, "*.v_proj": 4}, "formats": ("w4g128", "w8g128"),
            "target": "vllm", "search": 5, "model": "tiny",
            "bits": 3, "avg_bits": 3.25, "like": "Q4_K_M", "out": "out", "group_size": -1, "method": "rtn",
            "symmetric": True, "code": "auto", "head_bits": 8, "calib": "a.txt", "samples": 4, "seq_len": 64, "seed": 7,
            "preset": "best", "recipe": recipe, "plan": plan, "device": "cuda", "force": True, "resume": True,
            "trust_remote_code": True,
        }
    ]  # fmt: skip


def test_options_left_out_are_left_to_the_api(calls: list[dict[str, Any]]) -> None:
    run("quantize", "tiny", "--bits", "4")
    given = {name: value for name, value in calls[0].items() if value is not None}
    unset = {"force": False, "resume": False, "trust_remote_code": False}
    assert given == {"model": "tiny", "bits": 4, "device": "cpu", **unset}


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


def test_the_next_command_is_never_broken(calls: list[dict[str, Any]]) -> None:
    last = run("quantize", "a model/with a long name", "--bits", "4", columns=40).stdout.splitlines()[-1]
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
        (
            "quantize m",
            "nothing says how small the model is to be; pass --bits 2 to 8, --size, --max-kl, --recipe or --plan.",
        ),
        ("quantize m --bits 9", "--bits is 9; it must be a number from 1 to 8."),
        ("quantize m -b 0", "--bits is 0; it must be a number from 1 to 8."),
        ("quantize m --bits 4 --head-bits 3.5", "--head-bits is 3.5; it must be a whole number from 2 to 8."),
        ("quantize m --avg-bits 17", "--avg-bits is 17; it must be a number from 0 to 16."),
        ("quantize m --bits four", "--bits is four; it must be a number from 1 to 8."),
        ("quantize m --bits 4 --samples 0", "--samples is 0; it must be a whole number of 1 or more."),
        ("quantize m --pin v_proj", "--pin is v_proj; it must be NAMES=BITS, such as '*.down_proj=4'."),
        ("quantize m --max-kl 0", "--max-kl is 0; it must be a number above 0."),
        ("quantize m --max-ppl-increase 2", "--max-ppl-increase is 2; it must be a percentage above 0, such as 2%."),
        ("quantize m --bitz 4", "No such option --bitz; did you mean --bits? See `quantc quantize --help`."),
        ("quantize m --bits 4 --method awq", "'awq' is not one of 'gptq', 'rtn'."),
        ("pareto m --verify 1", "--verify measures points on a text, and there is none; pass --text too."),
        ("pareto m --avg-bits 3", "No such option --avg-bits"),
        ("quantize m --recipe nowhere.yaml", "File 'nowhere.yaml' does not exist."),
        ("quantize", "Missing argument 'MODEL'."),
        ("quantise m", "no such command 'quantise'; did you mean quantize? See `quantc --help`."),
        ("frobnicate", "no such command 'frobnicate'; known are quantize, plan, pareto, recipe, eval,"),
        ("eval m", "nothing says what to measure; pass --text, --tasks, or both."),
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_what_is_kept_is_said_in_the_same_line(
    fail_with: Callable[[BaseException], None], error: BaseException
) -> None:
    error.add_note("Kept in out.unfinished: 3 of 8 blocks;\n--resume continues from there.")
    fail_with(error)
    lines = run("quantize", "tiny", "--bits", "4").stderr.strip()
    assert lines.startswith("Error: ")
    assert lines.endswith(". Kept in out.unfinished: 3 of 8 blocks; --resume continues from there.")
    assert "\n" not in lines


def test_a_bug_is_one_line_that_names_the_file_with_its_traceback(
    fail_with: Callable[[BaseException], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTC_CACHE", str(tmp_path))
    fail_with(RuntimeError("shapes do not\nmatch \x1b[31m"))
    result = run("quantize", "tiny", "--bits", "4", "--json")
    assert result.exit_code == 70
    assert result.stdout == ""
    (file,) = (tmp_path / "crashes").iterdir()
    assert result.stderr == (
        f"Error: this is a bug in quantc (RuntimeError: shapes do not match \\x1b[31m); its traceback is in {file}, "
        "please report it.\n"
    )
    assert "in quantize\n    raise error" in file.read_text()


def test_a_bug_is_told_where_the_cache_cannot_be_written_to(
    fail_with: Callable[[BaseException], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUANTC_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(RecursionError())
    result = run("quantize", "tiny", "--bits", "4")
    (file,) = tmp_path.glob("quantc-*.txt")
    assert result.exit_code == 70
    assert f"its traceback is in {file}, please report it.\n" in result.stderr


@pytest.mark.parametrize("error", [IndexError("x"), KeyError("x"), OverflowError("x"), ZeroDivisionError("x")])
def test_no_exception_is_a_traceback(fail_with: Callable[[BaseException], None], error: Exception) -> None:
    fail_with(error)
    result = run("quantize", "tiny", "--bits", "4")
    assert result.exit_code == 70
    assert result.stderr.startswith(f"Error: this is a bug in quantc ({type(error).__name__}: ")
    assert result.stderr.count("\n") == 1


def test_a_message_of_megabytes_is_cut(fail_with: Callable[[BaseException], None]) -> None:
    fail_with(ModelError(f"the name {'x' * 10**6} is long"))
    shown = run("quantize", "tiny", "--bits", "4").stderr
    assert len(shown) < 2100
    assert shown.startswith("Error: the name xxx")
    assert shown.endswith("xxx is long\n")


@pytest.mark.parametrize("words", thinned([["--help"], ["recipe", "show", "best"]], every=2))
def test_a_reader_that_has_read_enough_is_no_failure(words: list[str]) -> None:
    command = [sys.executable, "-c", "from quantc.cli import main; main()", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"--samples {'9' * 5000}", "must be a whole number of 1 or more"),
        (f"--seed {2**63}", "must be a whole number of 0 or more"),
        (f"--pin *={'9' * 5000}", "must be NAMES=BITS"),
        (f"--bits {'9' * 5000}", "must be a number from 1 to 8"),
        ("--samples 1000001 --calib builtin", "samples is 1000001, but 1000000 at most are possible; lower it."),
    ],
)
def test_options_of_thousands_of_digits_are_refused(words: str, message: str) -> None:
    result = run("quantize", "m", "--bits", "4", *words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
