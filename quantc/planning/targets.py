"""Runtimes that load checkpoints after an export, and what they ask of a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..spec import GRIDS, Fixed, Ggml, QuantSpec, Uniform
from ..spec.groups import WHOLE_ROW


@dataclass(frozen=True)
class Runtime:
    """What a plan for a runtime keeps to. Groups run along inputs.

    container: what the checkpoint becomes, as `quantc export --to` takes it. fused: linears that read the same
    activation, and all experts of a block, are stored alike. bits, groups: what it holds on the uniform grid; -1 is a
    whole row. codes: the grids that it reads instead, if it does. others: formats that may be asked for besides. zeros:
    whether codes may have zero points. mixed, mixed_with_zeros: whether layers may have several widths, and whether
    also where codes have zero points.
    words: dimensions along which the codes of a weight fill whole words of 32 bits. tables: whether embedding and head
    may be packed. keeps_dtype: whether scales and floats are kept in the dtype of the model, and scales not in float16
    whatever that is. expert_zeros: whether stacks of experts may have zero points. experts_alike: whether all experts
    of a model are stored in one way. splits_floats: whether experts are stored one by one where they are floats, too.
    rotations: the largest block in which it rotates inputs of linears while the model runs, 0 where it does not.
    checked: what its facts were tried with or read in.
    """

    container: str
    fused: bool
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    codes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    zeros: bool = True
    mixed: bool = True
    mixed_with_zeros: bool = True
    words: str = ""
    tables: bool = False
    keeps_dtype: bool = False
    expert_zeros: bool = True
    experts_alike: bool = False
    splits_floats: bool = True
    rotations: int = 0
    checked: str = ""

    def formats(self, symmetric: bool) -> tuple[str, ...]:
        """Return the labels of the specs that it loads."""
        if self.codes:
            return tuple(spec_of_code(code).label() for code in self.codes)
        return tuple(QuantSpec(b, g, symmetric=symmetric).label() for b in self.bits for g in self.groups)

    def why_no_experts(self, spec: QuantSpec) -> tuple[str, str]:
        """Return why a stack of experts cannot be stored so, and what to pass instead; "" and "" where it can."""
        if spec.code == NVFP4 and self.experts_alike:  # transformers drops what all scales are multiplied by
            return f"in {NVFP4}, of whose scales its readers drop a factor", "--formats mxfp4"
        if spec.code == Uniform.name and not (spec.symmetric or self.expert_zeros):
            return "with zero points, which its readers do not load", "--symmetric"
        return "", ""

    def group_of(self, width: int) -> int | None:
        """Return the largest of its groups that divides a width, or else the whole row; None where it has neither."""
        whole = WHOLE_ROW if WHOLE_ROW in self.groups else None
        return max((group for group in self.groups if group > 0 and width % group == 0), default=whole)

    def candidates(self, shape: tuple[int, int]) -> list[QuantSpec]:
        """Return what a weight (N, K) can be stored as on the runtime's own grids."""
        return [spec_of_code(code) for code in self.codes if _grid(code).divides(shape[1])]

    def of_width(self, bits: int, shape: tuple[int, int]) -> QuantSpec | None:
        """Return the smallest of the candidates for a weight (N, K) whose codes have this many bits, or else more;
        of two alike the one with sub-scales. Only a budget chooses codes whose values are not evenly spaced.

        None where no block divides its rows.
        """
        found = [spec for spec in self.candidates(shape) if spec.code in EVEN]
        wide = [spec for spec in found if spec.bits >= bits]
        return min(wide or found, key=lambda spec: (spec.bits, spec.stored_bits(shape), -spec.group_size), default=None)


def spec_of_code(code: str) -> QuantSpec:
    """Return the spec of a code with blocks by its name."""
    grid = _grid(code)
    return QuantSpec(grid.width, grid.block, code=code)


def _grid(code: str) -> type[Fixed]:
    grid = GRIDS[code]
    assert issubclass(grid, Fixed)
    return grid


GGML = {name: grid for name, grid in GRIDS.items() if issubclass(grid, Ggml)}
EVEN = frozenset(name for name, grid in GGML.items() if not grid.table)


GROUPS = (32, 64, 128, -1)
NVFP4 = "nvfp4"
SMALL_FLOATS = (NVFP4, "mxfp4", "fp8-grow")
FOLDED = "folded into heads alone"
# Layers of several widths that it multiplies at once fail to load, or give garbage (vllm#50214).
VLLM = Runtime(
    "compressed-tensors", True, (2, 3, 4, 5, 6, 7, 8), GROUPS, others=SMALL_FLOATS, words="NK", keeps_dtype=True,
    expert_zeros=False, checked="tested: vLLM 0.32 on a CPU; experts and floats by reading",
)  # fmt: skip
RUNTIMES = {
    # llama.cpp: a type for each tensor. MXFP4 too: made for experts, but any tensor may have it.
    "gguf": Runtime("gguf", fused=False, codes=(*GGML, "mxfp4"), tables=True, checked="tested: llama.cpp b11549"),
    "vllm": VLLM,
    # It multiplies by a stored matrix, the same for all blocks of a row: one of 256 costs 256 products for each input.
    # It does so on one GPU, and for linears without biases.
    "vllm-rotated": replace(
        VLLM, rotations=256,
        checked="rotations tested: vLLM 0.32 on a CPU, its choice of product replaced; all else as vllm",
    ),
    # Zero points of one width only, as transformers then makes floats of all modules by the first group's scheme.
    "compressed-tensors": Runtime(
        "compressed-tensors", False, (2, 3, 4, 5, 6, 7, 8), GROUPS, others=SMALL_FLOATS, mixed_with_zeros=False,
        keeps_dtype=True, expert_zeros=False, experts_alike=True, splits_floats=False,
        checked="tested: transformers 5.23 with compressed-tensors 0.20",
    ),
    "gptq": Runtime(
        "gptq", True, (2, 3, 4, 8), GROUPS, words="NK",
        checked="tested: GPTQModel 7.6, alone and in transformers 5.23; by reading: vLLM 0.33",
    ),
    "awq": Runtime(
        "awq", True, (4,), GROUPS[:-1], mixed=False, words="N",
        checked="tested: GPTQModel 7.6, alone and in transformers 5.23, mlx-lm 0.32; by reading: vLLM 0.33",
    ),
    "auto-round": Runtime(
        "auto-round", True, (2, 3, 4, 8), GROUPS, zeros=False, words="NK",
        checked="tested: transformers 5.23 with auto-round 0.16; by reading: vLLM 0.33",
    ),
    "mlx": Runtime(
        "mlx", False, (2, 3, 4, 5, 6, 8), GROUPS[:-1], words="K", tables=True, keeps_dtype=True,
        checked="tested: mlx-lm 0.32",
    ),
}  # fmt: skip


def described(name: str) -> dict[str, str]:
    """Return what a runtime holds, in words, by the headings of the table of targets."""
    runtime = RUNTIMES[name]
    if runtime.codes:
        bits, groups, zeros = "2 to 8", "block types", "by type"
    else:
        bits = ", ".join(map(str, runtime.bits))
        groups = ", ".join("row" if group == -1 else str(group) for group in runtime.groups)
        zeros = "yes" if runtime.zeros else "no"
    return {
        "target": name,
        "container": runtime.container,
        "bits": bits,
        "groups": groups,
        "zero points": zeros,
        "widths": _widths(runtime),
        "embedding, head": "packed too" if runtime.tables else "floats",
        "experts": _experts(runtime),
        **({"other formats": ", ".join(runtime.others)} if runtime.others else {}),
        "rotations": f"online, in blocks of up to {runtime.rotations}" if runtime.rotations else FOLDED,
        "checked on": runtime.checked,
        **({"block types": ", ".join(code.upper() for code in runtime.codes)} if runtime.codes else {}),
    }


def _experts(runtime: Runtime) -> str:
    if runtime.container in ("gguf", "mlx"):
        return "stacked"
    alike = ", all alike" if runtime.experts_alike else ", those of a block alike" if runtime.fused else ""
    return "one by one" + alike + ("" if runtime.expert_zeros and runtime.zeros else ", no zero points")


def _widths(runtime: Runtime) -> str:
    if not runtime.mixed:
        return "one"
    several = "several, alike for layers with one input" if runtime.fused else "several"
    return several if runtime.mixed_with_zeros else f"{several}; one with zero points"
