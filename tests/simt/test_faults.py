"""A fault planted in a kernel is found and named, and what is allowed is not reported."""

from __future__ import annotations

import pytest
import torch

from quantc.kernels.cuda.program import Launch, Program
from tests.simt.harness import HERE, SimtError, run, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# In the order of Case in faults.cu, after FINE: what the report must say.
REPORTS = {
    "unwritten": r"unwritten: thread 5 reads byte 20 of dynamic shared memory \(faults.cu:\d+\)",
    "race read": r"race: thread 32 writes byte 128 of dynamic shared memory .* which thread 31 read",
    "race write after read": r"race: thread 32 reads byte 0 of dynamic .* which thread 0 wrote",
    "race write after many reads": r"race: thread 63 writes byte 0 of dynamic .* which thread \d+ read",
    "race in warp": r"race: thread 1 writes byte 4 of dynamic .* which thread 0 read",
    "race static": r"race: thread 1 writes byte 0 of shared fixed .* which thread 0 wrote",
    "left before barrier": r"barrier divergence: not all(.|\n)*threads 0-39 at sync_block(.|\n)*thread 40 left",
    "different barriers": r"barrier divergence: .* different barriers\n  threads 0-31 at (.|\n)*threads 32-63 at ",
    "left before shuffle": r"warp divergence: not all 32 lanes(.|\n)*thread 33 left(.|\n)*34-63 at shuffle_xor",
    "different operations": r"warp divergence: lanes(.|\n)*thread 7 at sync_warp \(faults.cu:\d+\)(.|\n)*32-63 still",
    "global write beyond": r"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*faults.cu(.|\n)*, thread 63",
    "global read beyond": r"heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*faults.cu(.|\n)*, thread 63",
    "shared beyond": r"st_shared out of bounds: 4 bytes at byte 1024 of 1024 bytes of dynamic(.|\n)*thread 63",
    "static beyond": r"st_shared out of bounds: byte 256 of shared fixed(.|\n)*thread 63",
    "shared directly": r"use-after-poison(.|\n)*faults.cu",
    "not shared": r"ld_shared: the address is not in shared memory",
    "no wait": r"copy in flight: thread 0 reads byte 0 of dynamic",
    "no commit": r"copy in flight: thread 0 reads byte 0 of dynamic",
    "wait for older": r"copy in flight: thread 0 reads byte 0 of dynamic",
    "wait without barrier": r"race: thread 1 reads byte 0 of dynamic .* which thread 0 wrote",
    "copy over read": r"copy in flight: thread 13 reads byte 200 of dynamic .* by thread 12",
    "misaligned copy": r"misaligned cp_async16: the address must be a multiple of 16",
    "misaligned load": r"misaligned load_once: the address must be a multiple of 16",
    "misaligned vector": r"runtime error: .* misaligned address",
    "misaligned shared": r"misaligned st_shared: the address must be a multiple of 8",
    "misaligned row": r"misaligned ldmatrix_trans: the address must be a multiple of 16(.|\n)*thread 1\n",
    "shift too far": r"shift exponent 32 is too large",
    "other block's data": r"unwritten: thread 0 reads byte 0 of shared fixed(.|\n)*block \(1, 0, 0\)",
}


def run_fault(number: int, backwards: bool = False, timeout: float = 60) -> torch.Tensor:
    output = torch.full((64,), -1.0)
    arguments = (number, torch.arange(64.0) * (number != len(REPORTS) + 1), output)
    launch = Launch(Program("faults.cu", "fault"), (2, 1, 1), (64, 1, 1), 1024, arguments)
    run(launch, folder=HERE / "programs", backwards=backwards, timeout=timeout)
    return output


@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_allowed_is_not_reported(backwards: bool) -> None:
    swapped = torch.arange(64).view(32, 2).flip(1).flatten()
    torch.testing.assert_close(run_fault(0, backwards), swapped.flip(0).float() + 2)


@pytest.mark.parametrize(("number", "name"), list(enumerate(REPORTS, start=1)))
def test_planted_faults_are_reported(number: int, name: str) -> None:
    with pytest.raises(SimtError) as caught:
        run_fault(number)
    assert caught.match(REPORTS[name])
    assert caught.match(r"in kernel fault, block \(\d, 0, 0\)")


def test_a_race_is_found_in_either_order() -> None:
    with pytest.raises(SimtError, match=r"race: thread \d+ writes byte \d+ of dynamic .* which thread \d+ read"):
        run_fault(list(REPORTS).index("race read") + 1, backwards=True)


def test_a_kernel_without_end_is_stopped() -> None:
    with pytest.raises(SimtError, match="fault did not end within 1 s"):
        run_fault(len(REPORTS) + 1, timeout=1)


def test_locals_nobody_wrote() -> None:
    output = torch.zeros(32)

    def run_with(*defines: tuple[str, int]) -> None:
        program = Program("uninitialised.cu", "uninitialised", defines)
        run(Launch(program, (1, 1, 1), (32, 1, 1), 0, (output, 3)), folder=HERE / "programs")

    run_with()
    assert (output < -1e37).all()
    with pytest.raises(SimtError, match="sum.* is used uninitialized"):
        run_with(("PLAIN", 1))
