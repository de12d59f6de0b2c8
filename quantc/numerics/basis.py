"""One activation's Gram matrix made ready for rounding the weights that read it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..spec import QuantSpec
from . import sparsity
from .grids import Parameters, arithmetic_of, fit_grid
from .groups import spread_groups
from .hadamard import BAND, rotate, rotate_gram
from .qtensor import QTensor
from .refine import refine, refit
from .rounding import Factor, Panel, factorize, gptq_each, round_to_nearest
from .row_widths import join

# An expert that saw fewer rows than this share of its inputs has a Gram matrix that mostly says "zero".
FEWEST_ROWS_SHARE = 1 / 16
# Code width from which on shrinking pays where inputs are not rotated. At 2 bits Gemma-3-270M has a KL divergence of
# 1.83 without, 2.21 at 0.15 and 2.28 at 0.3, SmolLM2-135M 1.45, 1.43 and 1.50; rotated they have 1.16 and 1.30 at 0.3.
SHRUNK_FROM_BITS = 3
# Scale of dropped weights while the others are rounded: whatever is fed back to them, their codes mean 0.
HELD = 2.0**100


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded: with error feedback through the Gram matrix of their inputs, or to nearest.

    damp, act_order: see `factorize`. rounds: of refinement after error feedback. shrink: the share by which what is
    beside the Gram matrix' diagonal is taken back (Ledoit and Wolf 2004): correlations of the calibration text that
    other text does not have. panel: see `gptq`; it decides how fast weights are rounded.
    """

    feedback: bool = True
    damp: float = 0.01
    act_order: bool = True
    rounds: int = 0
    shrink: float = 0.0
    panel: Panel | None = None

    def settings(self) -> dict[str, Any]:
        """Return all that a recipe says about rounding, by name."""
        return {name: value for name, value in vars(self).items() if name != "panel"}

    def basis(self, gram: torch.Tensor | None, rows: int, block: int, bits: int) -> Basis:
        """Return one activation's statistics, ready for rounding; raises ArithmeticError if they cannot be factorised.

        block: order of the rotation, 0 for none. bits: the smallest code width among the weights that read them.
        """
        if not self.feedback:
            return Basis.unguided(gram, rows, block, self.panel)
        if gram is not None and (block or bits >= SHRUNK_FROM_BITS):
            gram = self.shrunk(gram)
        return Basis.of(gram, rows, block, self.damp, self.act_order, self.panel)

    def shrunk(self, gram: torch.Tensor) -> torch.Tensor:
        """Return (K, K), a Gram matrix whose off-diagonal entries are shrunk."""
        if not self.shrink:
            return gram
        shrunk = gram * (1 - self.shrink)
        shrunk.diagonal().copy_(gram.diagonal())
        return shrunk

    def bases(self, gram: torch.Tensor | None, rows: int, specs: Iterable[QuantSpec]) -> dict[int, Basis]:
        """Return `basis` for every rotation among specs, by the order of its blocks."""
        widths: dict[int, int] = {}
        for spec in specs:
            widths[spec.hadamard] = min(spec.bits, widths.get(spec.hadamard, spec.bits))
        return {block: self.basis(gram, rows, block, bits) for block, bits in widths.items()}


@dataclass
class Basis:
    """What the calibration rows of one activation say to the weights that read it, after its rotation.

    rows: how many there were. block: order of the rotation's blocks, 0 for none. gram: float32 (K, K), None without
    calibration. factor: None where weights are rounded to nearest. panel: see `gptq`.
    """

    rows: int
    block: int
    gram: torch.Tensor | None = None
    factor: Factor | None = None
    panel: Panel | None = None

    @classmethod
    def unguided(cls, gram: torch.Tensor | None, rows: int, block: int, panel: Panel | None = None) -> Basis:
        """Return a basis without a factor, for rounding to nearest; a Gram matrix, if any, only measures errors."""
        return cls(rows, block, rotate_gram(gram, block) if block and gram is not None else gram, panel=panel)

    @classmethod
    def of(
        cls,
        gram: torch.Tensor | None,
        rows: int,
        block: int,
        damp: float,
        act_order: bool,
        panel: Panel | None = None,
    ) -> Basis:
        """Rotate and factor a Gram matrix; with too few rows to guide anything there is no factor.

        Raises ArithmeticError when the matrix cannot be factorised.
        """
        basis = cls.unguided(gram, rows, block, panel)
        if basis.gram is not None and rows >= len(basis.gram) * FEWEST_ROWS_SHARE:
            basis.factor = factorize(basis.gram, damp, act_order)
        return basis

    def turn(self, weight: torch.Tensor) -> torch.Tensor:
        """Rotate a weight: return float32 (N, K), as it multiplies the rotated rows; computed in float64."""
        if not self.block:
            return weight
        return torch.cat([rotate(band.double(), self.block).float() for band in weight.split(BAND)])

    @cached_property
    def damped(self) -> torch.Tensor:
        """The Gram matrix (K, K), float32, as it was factorised: damping on its diagonal, divided by a power of two.

        Its mean diagonal is near 1, whatever the size of activations: what refinement takes for 0 is that for all.
        """
        assert self.gram is not None
        assert self.factor is not None
        damped = self.gram.clone()
        diagonal = damped.diagonal()
        alive = diagonal[diagonal > 0]
        diagonal.add_(self.factor.damp * alive.mean() if len(alive) else 1.0)
        return damped.div_(torch.exp2(diagonal.mean().log2().round()))

    @cached_property
    def spectrum(self) -> sparsity.Spectrum:
        """The spectrum of `damped`; all weights that read the same rows share it."""
        return sparsity.Spectrum.of(self.damped)

    def round(
        self, weight: torch.Tensor, spec: QuantSpec, rounds: int = 0, wide: torch.Tensor | None = None
    ) -> QTensor:
        """Round a rotated weight (N, K) to its grid: with error feedback where there is a factor, to nearest otherwise.

        rounds: of refinement after error feedback. wide: bool (N,), the rows that have one bit more, where some have;
        what is fed back stays within a row, so that each width is rounded by itself.
        """
        if wide is None:
            return self.round_each(weight, [spec], rounds)[0]
        wide = wide.to(weight.device)
        (narrow, _), (more, _) = spec.halves((weight.shape[0], weight.shape[1]))
        halves = self.round(weight[~wide], narrow, rounds), self.round(weight[wide], more, rounds)
        return join(spec, wide, *halves)

    def round_each(self, weight: torch.Tensor, specs: Sequence[QuantSpec], rounds: int = 0) -> list[QTensor]:
        """Return `round` for each of the specs, of one width each. All share a sweep over the columns."""
        if self.factor is None:
            return [_to_nearest(weight, spec, self.panel) for spec in specs]
        starts = self._starts(weight, specs)
        held = [_held(start, spec) for start, spec in zip(starts, specs, strict=True)]
        codes = gptq_each(
            [start.weight for start in starts],
            self.factor,
            [fitted for fitted, _ in held],
            [spec for _, spec in held],
            self.panel,
        )
        return [
            self._finished(weight, found, start, spec, rounds)
            for found, start, spec in zip(codes, starts, specs, strict=True)
        ]

    def _starts(self, weight: torch.Tensor, specs: Sequence[QuantSpec]) -> list[_Start]:
        """Return what each spec's sweep begins with; specs that drop in the same pattern drop the same weights."""
        assert self.gram is not None
        fitted: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        starts: list[_Start] = []
        for spec in specs:
            if not spec.sparse:
                starts.append(_Start(weight, fit_grid(weight, spec, self.gram.diagonal())))
                continue
            pattern = spec.pattern.support(spec.groups)
            if pattern not in fitted:
                fitted[pattern] = self._fitted(weight, spec)
            support, stays = fitted[pattern]
            starts.append(_Start(support, fit_grid(support, spec, self.damped.diagonal()), stays))
        return starts

    def _fitted(self, weight: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 (N, K), weights that make up for what a spec drops, and bool (N, K), where they are."""
        assert self.gram is not None
        read = self.gram.diagonal() > 0  # inputs that were always zero go first
        stays = sparsity.by_admm(weight * read, self.spectrum, spec)
        return sparsity.fit_support(weight, self.damped, stays), stays

    def _finished(
        self, weight: torch.Tensor, codes: torch.Tensor, start: _Start, spec: QuantSpec, rounds: int
    ) -> QTensor:
        """Return the refined weight; where weights are dropped, scales are fitted to the codes at least.

        Where single weights are, refinement has no rounds: a descent would have to leave single codes out.
        """
        parameters, stays = start.parameters, start.stays
        if stays is None:
            if rounds:
                codes, parameters = refine(weight, codes, parameters, spec, self.damped, rounds)
            return _dense_qtensor(spec, codes, parameters)
        if rounds and spec.pattern.drops == "groups":
            length = spec.group_length((weight.shape[0], weight.shape[1]))
            held = _held_at(parameters, stays[:, ::length])
            codes, parameters = refine(weight, codes, held, spec, self.damped, rounds)
        else:
            parameters = refit(weight, codes, parameters, spec, self.damped)
        return _sparse_qtensor(spec, codes, parameters, stays)


@dataclass(frozen=True)
class _Start:
    """What a sweep begins with. weight: float32 (N, K). stays: bool (N, K), None where nothing is dropped."""

    weight: torch.Tensor
    parameters: Parameters
    stays: torch.Tensor | None = None


def _to_nearest(weight: torch.Tensor, spec: QuantSpec, panel: Panel | None) -> QTensor:
    """Round a weight without a factor; where the spec drops some, the largest weights or groups are kept."""
    if not spec.sparse:
        parameters = fit_grid(weight, spec)
        return _dense_qtensor(spec, round_to_nearest(weight, parameters, spec, panel), parameters)
    stays = sparsity.by_magnitude(weight, spec)
    parameters = fit_grid(weight * stays, spec)
    return _sparse_qtensor(spec, round_to_nearest(weight * stays, parameters, spec), parameters, stays)


def _held(start: _Start, spec: QuantSpec) -> tuple[Parameters, QuantSpec]:
    """Return the grid to sweep over and its spec: with dropped weights, each has its own scale, HELD if dropped."""
    stays = start.stays
    if stays is None:
        return start.parameters, spec
    shape = (stays.shape[0], stays.shape[1])
    single = start.parameters.mapped(lambda values: spread_groups(values, spec.groups, shape))
    return _held_at(single, stays), replace(spec.dense(), group_size=1)


def _held_at(parameters: Parameters, stays: torch.Tensor) -> Parameters:
    """Return parameters with the scale HELD where stays, bool and shaped as the scales, is False."""
    return replace(parameters, scales=parameters.scales.float().masked_fill(~stays, HELD))


def _dense_qtensor(spec: QuantSpec, codes: torch.Tensor, parameters: Parameters) -> QTensor:
    return QTensor.of(spec, codes, arithmetic_of(spec.grid).settle(codes, parameters, spec.groups))


def _sparse_qtensor(spec: QuantSpec, codes: torch.Tensor, parameters: Parameters, stays: torch.Tensor) -> QTensor:
    """Return the tensor of codes (N, K), zero points where stays (N, K) is False; a dropped group gets scale 1."""
    parameters = arithmetic_of(spec.grid).settle(codes, parameters, spec.groups)
    if spec.pattern.drops == "weights":
        return QTensor.of(spec, codes, parameters, kept=stays)
    kept = stays[:, :: spec.group_length((codes.shape[0], codes.shape[1]))]
    return QTensor.of(spec, codes, replace(parameters, scales=parameters.scales.masked_fill(~kept, 1)), kept=kept)
