"""Mutated files through every reader: a QuantcError of one line or an intact result, and never anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.harness import ACCEPTED, Fuzzer, attempt
from tests.fuzz.readers import Reader

CASES = 200
MANY = 20_000


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(corpus.make(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("scratch"))


def test_every_reader_accepts_what_is_intact(fuzzer: Fuzzer) -> None:
    assert {reader.name: fuzzer.read_intact(reader) for reader in fuzzer.table.rows} == {
        reader.name: ACCEPTED for reader in fuzzer.table.rows
    }


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (RecursionError("maximum"), "RecursionError: maximum"),
        (MemoryError(), "MemoryError"),
        (AssertionError("accepted, and the logits differ"), "AssertionError: accepted, and the logits differ"),
    ],
)
def test_any_other_exception_is_a_failure(error: Exception, said: str, tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        raise error

    assert attempt(Reader("one", 1, "", (), read), tmp_path).startswith(said)


def test_a_reader_that_does_not_end_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr("tests.fuzz.harness.CPU_SECONDS", 0.1)
    assert attempt(Reader("one", 1, "", (), read), tmp_path).startswith("it was still running after")


def test_a_case_is_the_same_every_time(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []
    monkeypatch.setattr(
        "tests.fuzz.harness.attempt",
        lambda reader, folder: seen.append((reader.name, b"".join(_files(folder)))) or ACCEPTED,
    )
    for number in (3, 4, 3):
        fuzzer.run(7, number)
    assert seen[0] == seen[2] != seen[1]


def _files(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()]


def test_a_short_selection(fuzzer: Fuzzer) -> None:
    failures = [failure for number in range(CASES) if (failure := fuzzer.run(1, number))]
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.slow
def test_twenty_thousand_mutations() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", str(MANY), "--minutes", "60"]
    root = str(Path(__file__).parent.parent.parent)
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{MANY} of {MANY} cases, 0 failures" in finished.stdout
