"""Parts of calibration batches: a block puts out the same for them, whatever else it is called with."""

from __future__ import annotations

import pytest
import torch

from quantc.calibration import precision
from quantc.calibration.stream import Batch
from quantc.pipeline.work import BlockWork
from tests.families import FAMILIES, VOCAB, build
from tests.helpers import block_works, in_memory_run

SAMPLES, LENGTH = 5, 40
TOKENS = torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def output(work: BlockWork, batch: Batch) -> torch.Tensor:
    call = work.calibration.call(work.block, batch).with_hidden(work.calibration.hidden(batch))
    with torch.no_grad():
        return work.block.returns.unwrap(call.run(work.module), call)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parts_of_a_batch_give_what_the_batch_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    for work in block_works(in_memory_run(build(family), bits=8, group_size=32), TOKENS):
        (whole,) = [output(work, batch) for batch in work.calibration.batches]
        parts = list(work.calibration.parts(2 * LENGTH))
        assert [(part.start, part.count) for part in parts] == [(0, 2), (2, 2), (4, 1)]
        torch.testing.assert_close(torch.cat([output(work, part) for part in parts]), whole, rtol=1e-4, atol=1e-5)


def test_a_part_has_one_sample_at_least() -> None:
    work = next(iter(block_works(in_memory_run(build("llama"), bits=8, group_size=32), TOKENS)))
    assert [part.count for part in work.calibration.parts(7)] == [1] * SAMPLES
