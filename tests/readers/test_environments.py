"""What happens where an environment is missing, or a reader fails."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantc.planning.targets import RUNTIMES
from tests.readers import environments
from tests.readers.claims import CLAIMS
from tests.readers.environments import READERS, Reader, ask, require

FOLDER = Path(__file__).parent
OTHER_TESTS = ("gguf", "vllm-rotated")  # targets whose readers have tests of their own
SCRIPT = """
import sys, time, os
sys.path.insert(0, {scripts!r})
from answer import answer
def logits(folder, tokens):
    if folder.endswith("slow"):
        time.sleep(60)
    if folder.endswith("dead"):
        print("out of luck", file=sys.stderr)
        os._exit(3)
    if folder.endswith("bad"):
        raise ValueError("not one of mine")
    return tokens[:, None] * [1.0, 2.0]
answer(logits)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader `toy` with this Python in its environment."""
    (tmp_path / "toy/bin").mkdir(parents=True)
    python = tmp_path / "toy/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "script.py").write_text(SCRIPT.format(scripts=str(FOLDER / "scripts")))
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    monkeypatch.setitem(READERS, "toy", Reader("toy", str(tmp_path / "script.py")))


def test_every_reader_has_packages_a_script_and_claims() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == {reader.environment for reader in READERS.values()} - {""}
    asked = {READERS[claim.reader].environment for claim in CLAIMS}
    assert asked == {reader.environment for reader in READERS.values()}
    for reader in READERS.values():
        assert (FOLDER / "scripts" / reader.script).is_file()
    for file in FOLDER.glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if not line.startswith(("#", "--editable"))]
        assert all("==" in line for line in lines)


def test_the_table_names_the_versions_that_are_tested() -> None:
    for target, runtime in RUNTIMES.items():
        tested = next((part for part in runtime.checked.split("; ") if part.startswith("tested: ")), "")
        readers = {claim.reader for claim in CLAIMS if claim.target == target}
        assert bool(readers) == bool(tested) or target in OTHER_TESTS, target
        for reader in readers:
            for package in reader.split(" with "):
                assert f"{package} {version(reader, package)}" in tested, target


def version(reader: str, package: str) -> str:
    """Return the first two numbers of the version of a package in a reader's environment."""
    environment = READERS[reader].environment
    text = (FOLDER / f"{environment}.txt" if environment else FOLDER.parents[1] / "constraints.txt").read_text()
    found = re.search(rf"^{package}(?:-cpu)?==(\d+\.\d+)", text, re.MULTILINE | re.IGNORECASE)
    assert found, package
    return found[1]


@pytest.mark.usefixtures("toy")
def test_a_missing_environment_is_skipped_with_what_to_type() -> None:
    with pytest.raises(pytest.skip.Exception, match="there is no environment .readers/toy: type `make readers`"):
        require("toy")
    (environments.ENVIRONMENTS / "toy/.ready").touch()
    require("toy")


@pytest.mark.usefixtures("toy")
def test_one_folder_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    good, bad = ask("toy", [tmp_path / "good", tmp_path / "bad"], torch.arange(3))
    assert isinstance(good, torch.Tensor)
    assert good.tolist() == [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    assert isinstance(bad, str)
    assert "ValueError: not one of mine" in bad


@pytest.mark.usefixtures("toy")
def test_a_reader_that_dies_or_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="toy ended with 3 before it had answered:\nout of luck"):
        ask("toy", [tmp_path / "dead"], torch.arange(3))
    monkeypatch.setitem(READERS, "toy", replace(READERS["toy"], start=1, each=1))
    with pytest.raises(AssertionError, match="toy did not answer within 2 s"):
        ask("toy", [tmp_path / "slow"], torch.arange(3))
