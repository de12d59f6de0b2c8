"""Options under headings: what `--help` shows, in a narrow and in a wide terminal."""

from __future__ import annotations

import re

import click
import pytest

from quantc.cli import main
from quantc.cli.headings import HEADINGS, HeadedOption
from tests.quantc.cli_runner import run

LONG = ("quantize", "plan", "pareto", "eval", "compare", "check")


def sections(shown: str) -> dict[str, list[str]]:
    """Return the long names of the options under every heading."""
    found: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if re.fullmatch(r"[A-Z][a-z ]+:", line):
            found[line[:-1]] = []
        elif found and re.match(r"  -", line):
            found[list(found)[-1]] += re.findall(r"--[a-z-]+", line.split("   ")[0])[:1]
    return found


def test_the_options_of_quantize_by_heading_and_the_common_ones_first() -> None:
    shown = sections(run("quantize", "--help", columns=110).stdout)
    assert list(shown) == ["How small", "How stored", "How rounded", "Calibration", "Output", "Run"]
    assert shown["How small"][:3] == ["--bits", "--size", "--avg-bits"]
    assert [names[0] for names in shown.values()] == [
        "--bits", "--group-size", "--preset", "--calib", "--out", "--device",
    ]  # fmt: skip
    assert shown["Run"][-1] == "--help"
    parameters = main.commands["quantize"].params
    assert sum(map(len, shown.values())) == sum(isinstance(item, click.Option) for item in parameters) + 1


@pytest.mark.parametrize("command", LONG)
def test_every_option_has_a_heading(command: str) -> None:
    found = [item for item in main.commands[command].params if isinstance(item, click.Option)]
    assert all(isinstance(item, HeadedOption) and item.heading in HEADINGS for item in found)


@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal_and_texts_start_in_one_column(command: str, columns: int) -> None:
    lines = run(command, "--help", columns=columns).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    options = lines[next(at for at, line in enumerate(lines) if line.rstrip(":") in HEADINGS) :]
    starts = {len(line) - len(line.lstrip()) for line in options if line.startswith("    ")}
    starts |= {match.end() for line in options if (match := re.match(r"  -.*?\S {2,}", line))}
    assert len(starts) == 1


def test_a_command_with_one_heading_has_a_plain_list() -> None:
    assert sections(run("inspect", "--help").stdout) == {"Options": ["--json", "--help"]}
