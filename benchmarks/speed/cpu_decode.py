"""Decode speed on the CPU: packed checkpoints, their original, and other runtimes where they are installed.

64 new tokens after a prompt of 32, batch 1, greedy, two threads; with --prompt 512 --new 1 it is prompts. Every
contestant is a process of its own, which waits while another has its turn; the turns alternate, so that other work on
the machine slows all of them. What is printed is the median over the rounds of the ratio to the original, and the
median time of a token. QUANTC_CPU_LEVEL, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA set the instructions.

    python -m benchmarks.speed.cpu_decode path/to/model checkpoint [checkpoint ...]
        --openvino PYTHON MODEL    an interpreter with optimum-intel, and a folder that it has exported
        --llama-cpp PYTHON FILE    an interpreter with xllamacpp, and a .gguf file
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from benchmarks.common import describe, machine, markdown, write_json
from quantc.kernels.cpu import library
from quantc.kernels.cpu.library import INT8_VARIABLE

WARM_UP = 3

# The programs of the contestants: each defines turn(), which makes NEW tokens after TOKENS.
TRANSFORMERS = """
model.generation_config.eos_token_id = None  # nothing stops it, and nothing has to look for what would
prompt = torch.tensor([TOKENS])
def turn():
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
"""
LOAD = {
    "original": "from quantc.frontend import open_model; model = open_model(PATH).load_whole(DTYPE)",
    "original, static cache and torch.compile": (
        "from quantc.frontend import open_model; from transformers import CompileConfig\n"
        "model = open_model(PATH).load_whole(DTYPE); config = model.generation_config\n"
        "config.cache_implementation, config.compile_config = 'static', CompileConfig(mode=None)\n"
        "config.compile_config._compile_all_devices = True"
    ),
    "plain": "import quantc; model = quantc.load(PATH, dtype=DTYPE)",
    "compile=True": "import quantc; model = quantc.load(PATH, dtype=DTYPE, compile=True)",
    "OpenVINO": (
        "from optimum.intel import OVModelForCausalLM\n"
        "model = OVModelForCausalLM.from_pretrained(PATH, ov_config={'INFERENCE_NUM_THREADS': THREADS})"
    ),
}
LLAMA_CPP = """
import xllamacpp
params = xllamacpp.CommonParams()
params.verbosity, params.model.path, params.n_ctx, params.n_batch, params.n_ubatch = 0, PATH, 1024, 1024, 1024
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
server = xllamacpp.Server(params)
request = {"prompt": TOKENS, "max_tokens": NEW, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
def turn():
    assert server.handle_completions(request)["usage"]["completion_tokens"] == NEW
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

    def __init__(self, python: str, program: str, path: str, args: Any, int8: bool = False):
        tokens = [101 + 37 * i for i in range(args.prompt)]  # any ordinary ones
        head = f"PATH, TOKENS, NEW, THREADS = {path!r}, {tokens}, {args.new}, {args.threads}\n"
        self._tokens = args.new if args.new > 1 else args.prompt
        self._process = subprocess.Popen(
            [python, "-c", head + program + LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {INT8_VARIABLE: str(int(int8))},
        )
        while (line := self._output().readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"the contestant for {path} ended before its first token")

    def turn(self) -> float:
        """Milliseconds for a new token, or for one of a prompt where only one is new."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._output().readline()) * 1e3 / self._tokens

    def close(self) -> None:
        self._process.kill()

    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout


def transformers_program(loading: str, dtype: str) -> str:
    return f"import torch; torch.set_num_threads(THREADS); DTYPE = torch.{dtype}\n{LOAD[loading]}\n{TRANSFORMERS}"


def contestants(args: Any) -> dict[str, Contestant]:
    here, compiles = sys.executable, args.new > 1  # of a prompt nothing is compiled
    found = {}
    for loading in ("original", "original, static cache and torch.compile")[: 1 + compiles]:
        found[loading] = Contestant(here, transformers_program(loading, args.dtype), args.model, args)
    for folder in args.checkpoints:
        for loading in ("plain", "compile=True")[: 1 + compiles]:
            program = transformers_program(loading, args.dtype)
            for int8 in (False, True)[: 1 + args.int8]:
                name = f"{folder.name}, {loading}" + ", int8 activations" * int8
                found[name] = Contestant(here, program, str(folder), args, int8)
    if args.openvino:
        program = transformers_program("OpenVINO", args.dtype)
        found["OpenVINO"] = Contestant(args.openvino[0], program, args.openvino[1], args)
    if args.llama_cpp:
        found["llama.cpp"] = Contestant(args.llama_cpp[0], LLAMA_CPP, args.llama_cpp[1], args)
    return found


def main() -> int:
    parser = describe(__doc__)
    parser.add_argument("model", help="the original: a folder or demo:smollm2")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--openvino", nargs=2, metavar=("PYTHON", "MODEL"))
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "FILE"))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--int8", action="store_true", help="checkpoints also with activations rounded to int8")
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
    rows = [row(name, found, times["original"]) for name, found in times.items()]
    sys.stdout.write(markdown(rows) + "\n")
    if args.out:
        asked = {name: getattr(args, name) for name in ("dtype", "threads", "prompt", "new")}
        write_json(args.out, {"machine": machine(), "level": library.level(), **asked, "rows": rows, "ms": times})
    return 0


def row(name: str, found: list[float], original: list[float]) -> dict[str, Any]:
    ratios = sorted(peer / own for peer, own in zip(original, found, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    median = round(statistics.median(found), 2)
    return {"model": name, "x original": round(statistics.median(ratios), 2), "range": spread, "ms a token": median}


if __name__ == "__main__":
    sys.exit(main())
