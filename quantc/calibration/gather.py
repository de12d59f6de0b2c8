"""Runs a block on the calibration set and sums up the rows that its linears read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..graph.model_graph import Activation, Block
from ..numerics.statistics import Drift, Gram
from .hooks import observed
from .stream import CalibrationRun

STATISTICS_BYTES = 2 << 30  # Gram matrices held at once; a block that needs more is run several times

Grams = dict[str, list[Gram]]  # by the activation's label, one for each expert of a stack


def rounds(items: list[Activation], experts: Callable[[Activation], int]) -> Iterator[list[Activation]]:
    """Yield the activations in groups whose Gram matrices fit STATISTICS_BYTES, unless a single one is larger."""
    current: list[Activation] = []
    held = 0
    for item in items:
        size = Gram.bytes_for(item.width) * experts(item)
        if current and held + size > STATISTICS_BYTES:
            yield current
            current, held = [], 0
        current.append(item)
        held += size
    if current:
        yield current


def stages(items: list[Activation]) -> list[list[Activation]]:
    """Return the activations in groups, in reading order; none is computed from readers of another in its group.

    What the same norm wrote shares a group, experts in a list among them; a gated or activated one follows the linears
    that wrote it. The others may come from attention, a convolution or the residual stream, so they follow everything
    read earlier. Experts that the probe did not reach come last.
    """
    found: list[list[Activation]] = []
    read_in: dict[str, int] = {}  # linear -> the group of what it reads
    written: dict[tuple[str, ...], int] = {}  # writers -> the group of what they wrote
    for item in sorted(items, key=lambda item: item.order if item.order >= 0 else math.inf):
        at = len(found)
        if item.order < 0:
            at = max(0, at - 1)
        elif item.writers in written:
            at = written[item.writers]
        elif item.kind in ("gated", "activated") and item.writers and read_in.keys() >= set(item.writers):
            at = 1 + max(read_in[name] for name in item.writers)
        if at == len(found):
            found.append([])
        found[at].append(item)
        read_in |= dict.fromkeys(item.readers, at)
        if item.writers:
            written.setdefault(item.writers, at)
    return found


def gather(calibration: CalibrationRun, block: Block, module: nn.Module, items: list[Activation], grams: Grams) -> None:
    """Add the rows of these activations over the whole set to their Gram matrices."""

    def add(label: str, expert: int, rows: torch.Tensor) -> None:
        grams[label][expert].add(rows, calibration.row_weights(label))

    with observed(module, block, items, add):
        for run in calibration.runs(block):
            run()


def gather_drifting(
    calibration: CalibrationRun,
    block: Block,
    module: nn.Module,
    items: list[Activation],
    grams: Grams,
    originals: dict[str, torch.Tensor],
) -> dict[str, Drift]:
    """Add the rows of these activations, and compare them with those of the block with its original weights.

    originals: by their names inside the block, the weights that are rounded by now. Both blocks run on the same
    hidden states. There is no drift for experts, which the rounded block may send other tokens.
    """
    rounded = {name: module.get_parameter(name).data for name in originals}
    drifts = {item.label: Drift(item.width, calibration.device) for item in items if len(grams[item.label]) == 1}

    def add(run: Callable[[], object]) -> None:
        _put(module, originals)
        before = _rows(run, module, block, [item for item in items if item.label in drifts])
        _put(module, rounded)
        for (label, expert), parts in _rows(run, module, block, items).items():
            weights = calibration.row_weights(label)
            for rows in parts:
                grams[label][expert].add(rows, weights)
            routed = sum(map(len, parts)) < calibration.batch_tokens
            unrounded = before.get((label, expert), [])
            if label in drifts and (routed or not drifts[label].add_all(unrounded, parts, weights)):
                del drifts[label]

    for run in calibration.runs(block):
        add(run)
    return drifts


def _rows(
    run: Callable[[], object], module: nn.Module, block: Block, items: list[Activation]
) -> dict[tuple[str, int], list[torch.Tensor]]:
    """Return the rows (M, K) of every activation and expert in one run, as often as it is read."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def keep(label: str, expert: int, rows: torch.Tensor) -> None:
        seen.setdefault((label, expert), []).append(rows.clone())

    if items:
        with observed(module, block, items, keep):
            run()
    return seen


def _put(module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        module.get_parameter(name).data = value
