"""Other runtimes that load folders, each in a virtual environment of its own: their packages exclude each other.

To add one: NAME.txt, the packages of its environment, all of them; a script in scripts/ that calls `answer`; a row in
READERS; and what it reads, in claims.py. `make readers` makes .readers/NAME, where quantc is not installed, but in
that of vLLM.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".readers"
SCRIPTS = Path(__file__).parent / "scripts"
LAST_LINES = 15  # of what a reader prints before it fails


@dataclass(frozen=True)
class Reader:
    """A runtime in an environment.

    environment: the folder in .readers, or "" for the tests' own. script: in scripts/. start, each: seconds that it may
    take to start, and for each folder; they end what hangs, not what is slow: beside other work two cores take minutes
    to import vLLM, and ten to compile a model. variables: of its process.
    """

    environment: str
    script: str
    start: int = 300
    each: int = 120
    variables: Mapping[str, str] = field(default_factory=dict)


READERS = {
    "transformers with compressed-tensors": Reader("", "read_transformers.py"),
    "mlx-lm": Reader("mlx", "read_mlx.py"),
    "transformers with auto-round": Reader("auto-round", "read_transformers.py"),
    "GPTQModel": Reader("gptqmodel", "read_gptqmodel.py"),
    "transformers with GPTQModel": Reader("gptqmodel", "read_transformers.py"),
    "vLLM": Reader("vllm", "read_vllm.py"),
    "vLLM in two processes": Reader("vllm", "read_vllm.py", each=300, variables={"PROCESSES": "2"}),
    "vLLM compiled": Reader("vllm", "read_vllm.py", each=900, variables={"COMPILE": "1"}),
    "vLLM's text": Reader("vllm", "generate_vllm.py", each=300),
}


def require(name: str) -> None:
    """Skip the test where a reader's environment was not made."""
    environment = READERS[name].environment
    if environment and not (ENVIRONMENTS / environment / ".ready").exists():
        pytest.skip(f"there is no environment .readers/{environment}: type `make readers`")


def ask(name: str, folders: Sequence[Path], tokens: torch.Tensor) -> list[torch.Tensor | str]:
    """Return a reader's logits (T, V), float32, of tokens (T,) by each of the folders, or what it failed with.

    All folders are read in one process. Raises AssertionError where that ends before it has answered.
    """
    reader = READERS[name]
    python = ENVIRONMENTS / reader.environment / "bin/python" if reader.environment else sys.executable
    with TemporaryDirectory() as place:
        np.save(Path(place, "tokens.npy"), tokens.numpy())
        command = [str(python), str(SCRIPTS / reader.script), place, *(str(folder.resolve()) for folder in folders)]
        _run(name, command, reader.start + reader.each * len(folders), _variables(reader))
        return [_answer(Path(place), number) for number in range(len(folders))]


def _run(name: str, command: list[str], seconds: int, variables: dict[str, str]) -> None:
    try:
        done = subprocess.run(
            command, cwd=command[2], env=variables, timeout=seconds, text=True, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{name} did not answer within {seconds} s") from error
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-LAST_LINES:])
        raise AssertionError(f"{name} ended with {done.returncode} before it had answered:\n{said}")


def _variables(reader: Reader) -> dict[str, str]:
    """Return the variables of its process: this one's, without those that lead to packages of the checkout."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**own, **quiet, **reader.variables}


def _answer(place: Path, number: int) -> torch.Tensor | str:
    if (failure := place / f"{number}.txt").exists():
        return failure.read_text(encoding="utf-8")
    return torch.from_numpy(np.load(place / f"{number}.npy"))
