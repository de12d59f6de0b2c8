"""A block in the build sweep of a run with calibration text: statistics of what its linears read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..calibration.gather import gather, gather_drifting, rounds, stages
from ..calibration.stream import CalibrationRun
from ..errors import CalibrationError
from ..graph.blocks import BlockCall
from ..graph.model_graph import Activation
from ..graph.rewrite import weight_name
from ..numerics.statistics import BAD_ROWS_LIMIT, Drift, Gram
from .work import BlockWork


@dataclass
class CalibratedWork(BlockWork):
    """One block and the calibration set before it."""

    calibration_run: CalibrationRun

    @property
    def calibration(self) -> CalibrationRun:
        return self.calibration_run

    def statistics(self) -> Iterator[tuple[Activation, list[Gram]]]:
        """Yield every activation that quantized linears read, with its Gram matrices (one per expert of a stack).

        Activations come in rounds that fit STATISTICS_BYTES; each round runs the block once on the whole set.
        The forward passes run on the block's weights before rounding. Statistics of an earlier pass are kept for later
        ones where all of them fit.
        """
        wanted = [item for item in self.block.activations if self.readers(item)]
        if self._kept:
            yield from self._hand_out(wanted, self._kept)
            return
        for items in rounds(wanted, self.experts):
            grams = self._new_grams(items)
            gather(self.calibration, self.block, self.module, items, grams)
            self._check_rows(items, grams)
            self._kept = grams if len(items) == len(wanted) and self.keep_statistics else {}
            yield from self._hand_out(items, grams)

    def drifting_statistics(self) -> Iterator[tuple[Activation, list[Gram], Drift | None]]:
        """Yield what `statistics` does, of the rows of the block as far as it is rounded, with their drift.

        The caller puts the rounded readers of what it got into `quantized` before it asks for more. There is no drift
        where rows are still the original ones, and none for experts, whose rows change with the routing.
        """
        wanted = [item for item in self.block.activations if self.readers(item)]
        self._kept = {}
        for items in [part for stage in stages(wanted) for part in rounds(stage, lambda item: 2 * self.experts(item))]:
            grams = self._new_grams(items)
            if self.originals:
                drifts = gather_drifting(self.calibration, self.block, self.module, items, grams, self.originals)
            else:
                drifts = {}
                gather(self.calibration, self.block, self.module, items, grams)
            self._check_rows(items, grams)
            for item in items:
                yield item, grams.pop(item.label), drifts.pop(item.label, None)
                self._release(item)
            rounded = [reader for item in items for reader in self.readers(item)]
            self.originals |= {weight_name(self.block, linear): self._parameter(linear).data for linear in rounded}
            self.replace_weights(rounded)

    def _hand_out(
        self, items: list[Activation], grams: dict[str, list[Gram]]
    ) -> Iterator[tuple[Activation, list[Gram]]]:
        for item in items:
            yield item, grams[item.label] if self.keep_statistics else grams.pop(item.label)
            self._release(item)

    def _probe(self) -> BlockCall:
        """Return a call of the block on the first tokens of the set."""
        return self.calibration.probe(self.block)

    def _check_rows(self, items: list[Activation], grams: dict[str, list[Gram]]) -> None:
        for item in items:
            bad = sum(gram.bad_rows for gram in grams[item.label])
            share = bad / max(1, bad + sum(gram.rows for gram in grams[item.label]))
            if share > BAD_ROWS_LIMIT:
                raise CalibrationError(
                    f"{share:.0%} of the rows that {item.readers[0]} receives are NaN or infinite, and past "
                    f"{BAD_ROWS_LIMIT:.0%} statistics mean nothing; check that the model runs in float32 on this text."
                )
            if bad:
                self.run.report.notes.append(f"{item.readers[0]} received {bad} non-finite calibration rows; left out")

    def _new_grams(self, items: list[Activation]) -> dict[str, list[Gram]]:
        return {item.label: [self.run.gram(item.width) for _ in range(self.experts(item))] for item in items}
