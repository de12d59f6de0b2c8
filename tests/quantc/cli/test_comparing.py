"""The commands compare and check: options, tables, exit codes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantc import api
from quantc.cli.comparing_tables import checked
from quantc.evaluation.blame import Blame, Restored
from quantc.evaluation.comparison import Compared, Comparison
from quantc.evaluation.gate import Held, Verdict
from quantc.evaluation.scores import Scores
from tests.quantc.cli_runner import run

FIRST = Compared("model", "float weights", 2_000_000, 32, 20.5, None, None, None, 40.0, "")
THREE = Compared("w3", "packed weights", 300_000, 3.25, 31.25, 0.41, 2.5, 0.7, 60.0, "", [0.1, 0.25])
COMPARED = Comparison([FIRST, THREE], "t.txt", 93, 3, "float32", "", ["layers.0", "layers.1"], ["w3 has a note"])
SCORES = Scores(31.25, 20.5, 0.41, 2.5, 0.7, 93, 3)
KL, INCREASE = Held("max_kl", 0.05, 0.41, False), Held("max_ppl_increase", 0.02, 0.015, True)
WORST = Blame([Restored("layers.1", 0.4, 0.41, 0.02)], [Restored("layers.1.up", 0.3, 0.41, 0.1)], 93, 12, [])
FAILED = Verdict("w3", "model", False, [KL, INCREASE], SCORES, "float32", "", [], WORST)
PASSED = Verdict("w3", "model", True, [INCREASE], SCORES, "float32", "", [])
CHECK = ("check", "w3", "--against", "model", "--text", "t.txt")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], list[dict[str, Any]]]:
    """Replaces a function of the api by one that records its arguments and returns a result."""

    def replace(name: str, result: Any) -> list[dict[str, Any]]:
        seen: list[dict[str, Any]] = []
        signature = inspect.signature(getattr(api, name))

        def stand_in(*args: Any, **settings: Any) -> Any:
            signature.bind(*args, **settings)
            del settings["progress"]
            seen.append({"models": args, **settings})
            return result

        monkeypatch.setattr(api, name, stand_in)
        return seen

    return replace


def lines(shown: str) -> list[str]:
    return [" ".join(line.split()) for line in shown.splitlines()]


def test_compare_passes_every_option_to_the_api(answer: Callable[..., list[dict[str, Any]]]) -> None:
    calls = answer("compare", COMPARED)
    words = "--text t.txt --blocks --page p.html --context 64 --stride 32 --windows 3 --dtype bfloat16 --device cuda"
    assert run("compare", "model", "w3", *words.split(), "--trust-remote-code").exit_code == 0
    assert calls == [
        {
            "models": ("model", "w3"), "text": "t.txt", "blocks": True, "page": Path("p.html"), "context": 64,
            "stride": 32, "windows": 3, "dtype": "bfloat16", "device": "cuda", "trust_remote_code": True,
        }
    ]  # fmt: skip


def test_compare_shows_a_line_for_each_model_and_for_each_block(answer: Callable[..., list[dict[str, Any]]]) -> None:
    answer("compare", COMPARED)
    shown = lines(run("compare", "model", "w3", "--text", "t.txt").stdout)
    assert shown[:3] == [
        "model size bits perplexity KL divergence p99 top-1 tokens/s computed with",
        "model 2.00 MB 32.0 20.50 40.0 float weights",
        "w3 300 kB 3.25 31.25 0.410 2.50 70.0 % 60.0 packed weights",
    ]
    assert "93 predictions in 3 windows of t.txt, computed in float32." in shown[4]
    assert shown[shown.index("block w3") :][:3] == ["block w3", "layers.0 0.100", "layers.1 0.250"]
    assert shown[-1] == "w3 has a note"


def test_compare_json(answer: Callable[..., list[dict[str, Any]]]) -> None:
    answer("compare", COMPARED)
    content = json.loads(run("compare", "model", "w3", "--text", "t.txt", "--json").stdout)
    assert [model["mean_kl"] for model in content["models"]] == [None, 0.41]
    assert content["page"] is None


def test_check_passes_every_option_to_the_api(answer: Callable[..., list[dict[str, Any]]]) -> None:
    calls = answer("check", PASSED)
    words = "--max-kl 0.05 --max-ppl-increase 2% --context 64 --stride 32 --windows 3 --dtype bfloat16 --device cuda"
    assert run(*CHECK, *words.split(), "--trust-remote-code").exit_code == 0
    assert calls == [
        {
            "models": (Path("w3"),), "against": "model", "text": "t.txt", "max_kl": 0.05, "max_ppl_increase": 0.02,
            "context": 64, "stride": 32, "windows": 3, "dtype": "bfloat16", "device": "cuda",
            "trust_remote_code": True,
        }
    ]  # fmt: skip


def test_check_that_passes(answer: Callable[..., list[dict[str, Any]]]) -> None:
    answer("check", PASSED)
    result = run(*CHECK, "--max-ppl-increase", "2%")
    assert result.exit_code == 0
    assert lines(result.stdout)[:2] == [
        "PASSED w3 against model",
        "perplexity increase 1.50 % within --max-ppl-increase 2%",
    ]


@pytest.mark.parametrize("words", [(), ("--json",), ("--quiet",)])
def test_check_that_fails_exits_with_1(answer: Callable[..., list[dict[str, Any]]], words: tuple[str, ...]) -> None:
    answer("check", FAILED)
    result = run(*CHECK, "--max-kl", "0.05", *words)
    assert result.exit_code == 1
    assert result.stderr == ""
    if words == ("--json",):
        assert json.loads(result.stdout)["blame"]["blocks"][0]["name"] == "layers.1"
    elif words:
        assert result.stdout == ""


def test_check_names_what_loses_most(answer: Callable[..., list[dict[str, Any]]]) -> None:
    answer("check", FAILED)
    shown = lines(run(*CHECK, "--max-kl", "0.05").stdout)
    assert shown[0] == "FAILED w3 against model"
    assert shown[1] == "KL divergence 0.410 exceeds --max-kl 0.05"
    at = shown.index("Blocks that lose most")
    assert shown[at + 1 : at + 3] == ["restored KL from to alone", "layers.1 0.410 0.0200 0.400"]
    at = shown.index("Layers in them that lose most")
    assert shown[at + 2] == "layers.1.up 0.410 0.100 0.300"
    assert "put back in 12 ways, each measured on 93 predictions" in " ".join(shown)


def test_names_command_no_terminal() -> None:
    from rich.console import Console

    console = Console(width=100, record=True)
    verdict = {**FAILED.to_dict(), "model": "[red]w3[/]"}
    with console.capture() as capture:
        console.print(checked(verdict), markup=False)
    assert "[red]w3[/]" in capture.get()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("compare --text t.txt", "Missing argument 'MODELS...'."),
        ("compare a --text t.txt", "1 model was named, but a comparison needs two or more; name another, or use"),
        ("compare a b", "Missing option '--text'."),
        ("compare a b --text nowhere.txt --page no/p.html", "the folder no of the page does not exist; make it, or"),
        ("check a --against b --text t.txt", "no limit was given; pass --max-kl 0.05, --max-ppl-increase 2%, or both."),
        ("check a --text t.txt --max-kl 0.05", "Missing option '--against'."),
        ("check a --against b --text t.txt --max-kl 0", "--max-kl is 0; it must be a number above 0."),
        (
            "check a --against b --text t.txt --max-ppl-increase 2",
            "--max-ppl-increase is 2; it must be a percentage above 0, such as 2%.",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words: str, message: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
