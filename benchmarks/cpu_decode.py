"""Decode speed on the CPU: packed checkpoints, their original in bfloat16, and other runtimes where they are installed.

64 new tokens after a prompt of 32, batch 1, greedy, two threads. Every contestant is a process of its own, which waits
while another has its turn; the turns alternate, so that other work on the machine slows all of them. What is printed is
the median over the rounds of the ratio to the bfloat16 model, and the median time of a token.

    python -m benchmarks.cpu_decode path/to/model checkpoint [checkpoint ...]
        --openvino PYTHON MODEL    an interpreter with optimum-intel, and a folder that it has exported
        --llama-cpp PYTHON FILE    an interpreter with llama-cpp-python, and a .gguf file
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from .common import describe, machine, markdown, write_json

NEW, PROMPT, THREADS, WARM_UP = 64, 32, 2, 3

# The programs of the contestants: each defines turn(), which makes NEW tokens after TOKENS.
TRANSFORMERS = """
model.generation_config.eos_token_id = None  # nothing stops it, and nothing has to look for what would
prompt = torch.tensor([TOKENS])
def turn():
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
"""
LOAD = {
    "bfloat16": "from quantc.frontend import open_model; model = open_model(PATH).load_whole(torch.bfloat16)",
    "bfloat16, static cache and torch.compile": (
        "from quantc.frontend import open_model; from transformers import CompileConfig\n"
        "model = open_model(PATH).load_whole(torch.bfloat16); config = model.generation_config\n"
        "config.cache_implementation, config.compile_config = 'static', CompileConfig(mode=None)\n"
        "config.compile_config._compile_all_devices = True"
    ),
    "plain": "import quantc; model = quantc.load(PATH, dtype=torch.bfloat16)",
    "compile=True": "import quantc; model = quantc.load(PATH, dtype=torch.bfloat16, compile=True)",
    "OpenVINO": (
        "from optimum.intel import OVModelForCausalLM\n"
        "model = OVModelForCausalLM.from_pretrained(PATH, ov_config={'INFERENCE_NUM_THREADS': THREADS})"
    ),
}
LLAMA_CPP = """
from llama_cpp import Llama
model = Llama(PATH, n_ctx=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
def turn():
    model.reset()
    for count, _ in enumerate(model.generate(TOKENS, temp=0.0), 1):
        if count == NEW: break
"""
LOOP = """
import sys, time
turn()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter(); turn(); print(time.perf_counter() - start, flush=True)
"""


class Contestant:
    """A process that makes tokens when told to."""

    def __init__(self, python: str, program: str, path: str):
        tokens = [101 + 37 * i for i in range(PROMPT)]  # any ordinary ones
        head = f"PATH, TOKENS, NEW, THREADS = {path!r}, {tokens}, {NEW}, {THREADS}\n"
        self._process = subprocess.Popen(
            [python, "-c", head + program + LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while (line := self._output().readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"the contestant for {path} ended before its first token")

    def turn(self) -> float:
        """Milliseconds for a token."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._output().readline()) * 1e3 / NEW

    def close(self) -> None:
        self._process.kill()

    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout


def transformers_program(loading: str) -> str:
    return f"import torch; torch.set_num_threads(THREADS)\n{LOAD[loading]}\n{TRANSFORMERS}"


def contestants(args: Any) -> dict[str, Contestant]:
    here = sys.executable
    found = {}
    for loading in ("bfloat16", "bfloat16, static cache and torch.compile"):
        found[loading] = Contestant(here, transformers_program(loading), args.model)
    for folder in args.checkpoints:
        for loading in ("plain", "compile=True"):
            found[f"{folder.name}, {loading}"] = Contestant(here, transformers_program(loading), str(folder))
    if args.openvino:
        found["OpenVINO"] = Contestant(args.openvino[0], transformers_program("OpenVINO"), args.openvino[1])
    if args.llama_cpp:
        found["llama.cpp"] = Contestant(args.llama_cpp[0], LLAMA_CPP, args.llama_cpp[1])
    return found


def main() -> int:
    parser = describe(__doc__)
    parser.add_argument("model", help="the original: a folder or demo:smollm2")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--openvino", nargs=2, metavar=("PYTHON", "MODEL"))
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "FILE"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write JSON here")
    args = parser.parse_args()
    running = contestants(args)
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(WARM_UP + args.rounds):
        for name, contestant in running.items():
            taken = contestant.turn()
            if number >= WARM_UP:
                times[name].append(taken)
    for contestant in running.values():
        contestant.close()
    rows = [row(name, found, times["bfloat16"]) for name, found in times.items()]
    sys.stdout.write(markdown(rows) + "\n")
    if args.out:
        write_json(args.out, {"machine": machine(), "rows": rows, "ms": times})
    return 0


def row(name: str, found: list[float], original: list[float]) -> dict[str, Any]:
    ratios = sorted(peer / own for peer, own in zip(original, found, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    median = round(statistics.median(found), 2)
    return {"model": name, "x bfloat16": round(statistics.median(ratios), 2), "range": spread, "ms a token": median}


if __name__ == "__main__":
    sys.exit(main())
