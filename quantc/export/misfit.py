"""What a container cannot hold: the reasons, and the error that names the first weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.config import PackedEntry
from ..errors import UsageError


@dataclass(frozen=True)
class Misfit:
    """Why a container cannot hold a weight, and what to quantize it with instead.

    {name} in the remedy is for the last part of the weight's name.
    """

    reason: str
    remedy: str


def refusal(container: str, misfits: Mapping[str, Misfit]) -> UsageError:
    """Return the error for weights that a container cannot hold: it names the first."""
    name, first = next(iter(misfits.items()))
    remedy = first.remedy.format(name=name[name.rfind(".") :])
    others = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
    return UsageError(f"{container} cannot hold {name}{others}: {first.reason}; quantize the model again {remedy}.")


def misfit_of_structure(entry: PackedEntry) -> Misfit | None:
    """Return what a packed weight has that quantc alone holds; None for codes in groups along inputs."""
    spec = entry.spec
    for there, reason, remedy in (
        (spec.grouping != "per_oc", "it has per_ic groups", "without group_channels in its recipe"),
        (spec.rank > 0, f"it has a low-rank addition of rank {spec.rank}", "without compensate in its recipe"),
        (
            spec.hadamard > 0,
            "its input is rotated while the model runs",
            "with --preset fast, or for vLLM with --target vllm-rotated",
        ),
        (
            spec.wide_rows > 0,
            f"{spec.wide_rows} of its rows have one bit more",
            "with --bits 4, or with --formats of whole widths",
        ),
        (spec.sparse, "some of its weights are dropped, and blocks would store them", "without --sparsity"),
    ):
        if there:
            return Misfit(reason, remedy)
    return None
