"""The tensors of a packed checkpoint as a container has them: packed modules and floats, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ...checkpoint.config import PackedEntry, read_residual_rotation
from ...checkpoint.reader import CheckpointReader
from ...errors import UsageError
from ...formats import format_of
from ...numerics.qtensor import QTensor
from ...planning.targets import RUNTIMES, Runtime
from ...spec import Uniform
from ..misfit import Misfit, misfit_of_structure, refusal
from .base import FolderContainer, Scheme

WORD_BITS = 32
# Layers that runtimes multiply as one (vLLM's packed_modules_mapping).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))


class Contents:
    """What a checkpoint holds for a container; raises UsageError that names the first weight which that cannot hold.

    target: the name of the runtime that limits it. model: the checkpoint's, its weights on the meta device.
    """

    def __init__(self, reader: CheckpointReader, container: FolderContainer, target: str, model: nn.Module):
        self._reader, runtime = reader, RUNTIMES[target]
        self.keeps_dtype = runtime.keeps_dtype
        _refuse_rotation(reader, container)
        modules = dict(model.named_modules())
        self.entries = {name.removesuffix(".weight"): (name, entry) for name, entry in reader.entries.items()}
        found = {
            name: misfit
            for name, (_, entry) in self.entries.items()
            if (misfit := misfit_of(entry, modules.get(name), runtime, target)) is not None
        }
        if found:
            raise refusal(target, found)
        self.schemes = {name: Scheme.of(entry.spec, entry.shape) for name, (_, entry) in self.entries.items()}
        linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        _check_together(self.schemes, linears, runtime, target)
        self.floats = tuple(name for name in linears if name not in self.entries)
        parts = {f"{prefix}.{part}" for prefix, entry in self.entries.values() for part in entry.layout()}
        self._plain = [name for name in reader.slices() if name not in parts]

    def packed(self) -> Iterator[tuple[str, QTensor]]:
        """Yield every packed weight by its module's name."""
        for name, (prefix, entry) in self.entries.items():
            parts = {part: self._reader.tensor(f"{prefix}.{part}") for part in entry.layout()}
            yield name, format_of(entry.spec).unpack(parts, entry.spec, entry.shape)

    def plain(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every other tensor of the checkpoint."""
        for name in self._plain:
            yield name, self._reader.tensor(name)

    def scale_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype of scales in the container; stored: that of the model, which some readers give them.

        bfloat16 has fewer digits than quantc's scales: a model in it becomes one of float16 there, unless no scale
        needs them.
        """
        if not self.keeps_dtype:
            return torch.float16
        scales = (self._reader.tensor(f"{prefix}.scales") for prefix, _ in self.entries.values())
        exact = stored != torch.bfloat16 or all(torch.equal(part.to(stored).to(part.dtype), part) for part in scales)
        return stored if exact else torch.float16


def misfit_of(entry: PackedEntry, module: nn.Module | None, runtime: Runtime, container: str) -> Misfit | None:
    """Return why a container cannot hold a packed weight, None where it can."""
    spec, (n, k) = entry.spec, entry.shape
    if (misfit := misfit_of_structure(entry)) is not None:
        return misfit
    if not isinstance(spec.grid, Uniform):
        return Misfit(f"it has the code {spec.code}, and {container} holds whole numbers", "with --bits 4")
    if entry.leading:
        return Misfit("it is a stack of experts, which is not written yet", "with --target gguf")
    if isinstance(module, nn.Embedding) and not runtime.tables:
        return Misfit("it is the embedding", f"with --target {container}, or with --head-bits keep")
    if not isinstance(module, nn.Linear | nn.Embedding):
        return Misfit(f"its module is a {type(module).__name__}, and it holds nn.Linear alone", "with --target gguf")
    if spec.bits not in runtime.bits:
        return Misfit(
            f"it has codes of {spec.bits} bits, and {container} holds {_listed(runtime.bits)}", "with --bits 4"
        )
    if not runtime.zeros and not spec.symmetric:
        return Misfit("it has zero points", "with --symmetric")
    group = spec.group_length(entry.shape)
    if k % group or not (group in runtime.groups or (group == k and -1 in runtime.groups)):
        held = _listed([length for length in runtime.groups if length > 0])
        return Misfit(f"it has groups of {group} of {k} inputs, and {container} holds {held}", "with --group-size 32")
    for axis, count, sides in (("N", n, "outputs"), ("K", k, "inputs")):
        if axis in runtime.words and count * spec.bits % WORD_BITS:
            reason = f"{count} {sides} of {spec.bits} bits fill no whole words of {WORD_BITS} bits"
            return Misfit(reason, "with --pin '*{name}=16'")
    return None


def _check_together(schemes: Mapping[str, Scheme], linears: Sequence[str], runtime: Runtime, target: str) -> None:
    """Raise UsageError for schemes that a runtime does not hold beside each other."""
    if runtime.fused:
        _check_fused(schemes, linears, target)
    if len({(scheme.bits, scheme.group_size) for scheme in schemes.values()}) < 2:
        return
    if not runtime.mixed:
        raise UsageError(
            f"{target} holds one width and one group size, and layers have several; quantize the model again with "
            "--bits 4 --group-size 64 --head-bits keep."
        )
    if any(not scheme.symmetric for scheme in schemes.values()) and not runtime.mixed_with_zeros:
        raise UsageError(
            f"{target} with several widths is read with symmetric codes alone; quantize the model again with "
            "--symmetric, or export it with --to vllm."
        )


def _check_fused(schemes: Mapping[str, Scheme], linears: Sequence[str], target: str) -> None:
    """Raise UsageError that names two layers which the runtime multiplies at once and which are stored otherwise."""
    together: dict[tuple[str, int], list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        for number, names in enumerate(FUSED):
            if leaf in names:
                together.setdefault((parent, number), []).append(name)
    for first, *others in together.values():
        for other in others:
            if schemes.get(other) != schemes.get(first):
                raise UsageError(
                    f"{target} multiplies {first} and {other[other.rfind('.') + 1 :]} at once, and they are stored "
                    f"differently; quantize the model again with --target {target}."
                )


def _refuse_rotation(reader: CheckpointReader, container: FolderContainer) -> None:
    if read_residual_rotation(reader.config) is not None:
        raise UsageError(
            f"{reader.folder} has a rotated residual stream, which no reader of {container.name} rotates back; "
            "quantize the model again with --preset fast, or with a recipe without rotate."
        )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
