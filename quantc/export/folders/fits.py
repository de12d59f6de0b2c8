"""What a runtime cannot hold of a packed checkpoint, weight by weight and of weights beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ...checkpoint.config import PackedEntry
from ...errors import UsageError
from ...numerics.hadamard import is_small
from ...planning.targets import Runtime
from ...spec import Uniform
from ..misfit import Misfit, misfit_of_structure
from .base import Experts, Scheme
from .places import STACKED_LEAVES, Place, expert_of

WORD_BITS = 32
# What readers call the matrices of an expert. auto-round 0.16 in transformers draws weights at random for other names.
LEAVES = {"mlx": frozenset(STACKED_LEAVES), "auto-round": frozenset(STACKED_LEAVES.values())}
# Layers that runtimes multiply as one (vLLM's packed_modules_mapping).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))


def misfit_of(
    entry: PackedEntry, places: Sequence[Place], module: nn.Module | None, runtime: Runtime, target: str
) -> Misfit | None:
    """Return why a target cannot hold a packed weight, None where it can. places: the matrices that it becomes."""
    spec = entry.spec
    if runtime.rotations and spec.hadamard:
        if (misfit := _misfit_of_rotation(entry, module, runtime, target)) is not None:
            return misfit
        entry = replace(entry, spec=replace(spec, hadamard=0))
    if (misfit := misfit_of_structure(entry)) is not None:
        return misfit
    floats = not isinstance(spec.grid, Uniform)
    if floats and spec.label() not in runtime.others:
        held = ", ".join(("whole numbers", *runtime.others))
        return Misfit(f"it is stored as {spec.label()}, and {target} holds {held}", "with --bits 4")
    if entry.leading:
        misfit = _misfit_of_stack(entry, places, runtime, target)
    elif isinstance(module, nn.Embedding) and not runtime.tables:
        misfit = Misfit("it is the embedding", f"with --target {target}, or with --head-bits keep")
    elif not isinstance(module, nn.Linear | nn.Embedding):
        misfit = Misfit(f"its module is a {type(module).__name__}, and it holds nn.Linear alone", "with --target gguf")
    codes = None if floats else _misfit_of_codes(entry, runtime, target)
    return misfit or codes or _misfit_of_words(entry, places, runtime)


def _misfit_of_rotation(entry: PackedEntry, module: nn.Module | None, runtime: Runtime, target: str) -> Misfit | None:
    order, k, remedy = entry.spec.hadamard, entry.shape[1], f"with --target {target}"
    if order > runtime.rotations or not (order == k or is_small(k, order)):
        reason = f"its input is rotated in blocks of {order}, and {target} holds blocks of up to {runtime.rotations}"
        return Misfit(f"{reason} that are alike", remedy)
    if entry.leading:
        return Misfit(f"it is a stack of experts with rotated inputs, which {target} does not rotate", remedy)
    if getattr(module, "bias", None) is not None:
        return Misfit(f"it has a bias and rotated inputs, which {target} does not hold together", remedy)
    return None


def _misfit_of_stack(entry: PackedEntry, places: Sequence[Place], runtime: Runtime, target: str) -> Misfit | None:
    leaves = {expert_of(place.rows)[1] for place in places if place.rows is not None}
    if not leaves:
        reason = f"it is a stack of experts that published models of its kind do not store one by one, as {target} does"
        return Misfit(reason, "with --pin '*{name}=16'")
    unknown = sorted(leaves - LEAVES.get(runtime.container, leaves))
    if unknown:
        reason = f"its experts have a matrix {unknown[0]}, which readers of {target} do not find"
        return Misfit(reason, "with --target vllm")
    why, instead = runtime.why_no_experts(entry.spec)
    return Misfit(f"it is a stack of experts {why}", f"with {instead}") if why else None


def _misfit_of_codes(entry: PackedEntry, runtime: Runtime, target: str) -> Misfit | None:
    spec, k = entry.spec, entry.shape[1]
    if spec.bits not in runtime.bits:
        return Misfit(f"it has codes of {spec.bits} bits, and {target} holds {_listed(runtime.bits)}", "with --bits 4")
    if not runtime.zeros and not spec.symmetric:
        return Misfit("it has zero points", "with --symmetric")
    group = spec.group_length(entry.shape)
    if k % group or not (group in runtime.groups or (group == k and -1 in runtime.groups)):
        held = _listed([length for length in runtime.groups if length > 0])
        remedy = "with --group-size 32" if k % 32 == 0 else "with --pin '*{name}=16'"
        return Misfit(f"it has groups of {group} of {k} inputs, and {target} holds {held}", remedy)
    return None


def _misfit_of_words(entry: PackedEntry, places: Sequence[Place], runtime: Runtime) -> Misfit | None:
    spec = entry.spec
    for place in places:
        for axis, count, sides in zip("NK", place.shape, ("outputs", "inputs"), strict=True):
            if axis in runtime.words and count * spec.bits % WORD_BITS:
                reason = f"{count} {sides} of {spec.bits} bits fill no whole words of {WORD_BITS} bits"
                return Misfit(reason, "with --pin '*{name}=16'")
    return None


def check_together(
    schemes: Mapping[str, Scheme],
    rotations: Mapping[str, int],
    experts: Sequence[Experts],
    linears: Iterable[str],
    runtime: Runtime,
    target: str,
) -> None:
    """Raise UsageError for schemes that a runtime does not hold beside each other. linears: all, floats too."""
    if runtime.fused:
        _check_fused(schemes, rotations, linears, target)
        _check_experts(experts, target)
    ways = {scheme for each in experts for scheme in each.schemes.values() if scheme} | set(schemes.values())
    if len({(scheme.code, scheme.bits, scheme.group_size) for scheme in ways}) < 2:
        return
    if not runtime.mixed:
        raise UsageError(
            f"{target} holds one width and one group size, and layers have several; quantize the model again with "
            "--bits 4 --group-size 64 --head-bits keep."
        )
    if any(not scheme.symmetric for scheme in ways) and not runtime.mixed_with_zeros:
        raise UsageError(
            f"{target} with several widths or group sizes is read with symmetric codes alone; quantize the model again "
            "with --symmetric, or export it with --to vllm."
        )


def fused_layers(linears: Iterable[str]) -> list[list[str]]:
    """Return those of some linears that runtimes multiply at once, together."""
    together: dict[tuple[str, int], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        for number, names in enumerate(FUSED):
            if leaf in names:
                together.setdefault((parent, number), []).append(name)
    return list(together.values())


def _check_fused(
    schemes: Mapping[str, Scheme], rotations: Mapping[str, int], linears: Iterable[str], target: str
) -> None:
    """Raise UsageError that names two layers which the runtime multiplies at once and which are stored otherwise."""
    for first, *others in fused_layers(linears):
        for other in others:
            if (schemes.get(other), rotations.get(other)) != (schemes.get(first), rotations.get(first)):
                raise UsageError(
                    f"{target} multiplies {first} and {other[other.rfind('.') + 1 :]} at once, and they are stored "
                    f"differently; quantize the model again with --target {target}."
                )


def _check_experts(experts: Sequence[Experts], target: str) -> None:
    for each in experts:
        if len(set(each.schemes.values())) > 1:
            raise UsageError(
                f"{target} holds all matrices of the experts {each.prefix} in one way, and they are stored "
                f"differently; quantize the model again with --target {target}."
            )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
