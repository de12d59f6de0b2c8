"""What a run says of the GGUF file that it has written: the type of every tensor and why, and what the size is like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ...driver.metadata import PLAN_FILE
from ...errors import UsageError
from ...plan import Plan, read_plan
from ...report import Report
from ...units import plural, size
from .blocks import FLOAT_NAMES
from .draft import Draft
from .job import Exported, Stored
from .mixes import MIXES

LARGE_BLOCK = 256  # weights of the blocks of Q2_K to Q6_K and IQ4_XS


def summarize(report: Report, exported: Exported, draft: Draft, folder: Path) -> None:
    """Make the report of the checkpoint in a folder that of the file."""
    plan = read_plan(folder / PLAN_FILE)
    report.output, report.weights_bytes = exported.output, exported.bytes
    report.tensors = [{**vars(tensor), "why": _remark(plan, tensor)} for tensor in exported.tensors]
    kinds = (f"{kind} {plural(count, 'tensor')} ({size(total)})" for kind, (count, total) in exported.types.items())
    report.notes += [f"types: {', '.join(kinds)}", *notes_on_rows(exported.tensors)]
    report.notes += [f"the size: {compared}"] if (compared := compare(exported.bytes, draft)) else []
    report.notes += exported.notes
    if exported.agreement is not None:
        report.notes.append(
            f"llama.cpp reads it: a KL divergence of {exported.agreement.kl:.2g} from quantc's own logits"
        )


def _remark(plan: Plan, tensor: Stored) -> str:
    """Return what the plan says of the linear, or of the weight outside the blocks, that a tensor is."""
    name = tensor.source or ""
    return plan.why.get(name) or plan.why.get(name.removesuffix(".weight"), "")


def notes_on_rows(tensors: Iterable[Stored]) -> list[str]:
    """Return a sentence for every width of rows that large blocks do not divide."""
    rounded = [tensor for tensor in tensors if tensor.type not in FLOAT_NAMES.values()]
    widths = Counter(tensor.shape[-1] for tensor in rounded)
    return [
        f"{plural(count, 'tensor')} with rows of {width} weights, which {LARGE_BLOCK} does not divide: no _K type fits"
        for width, count in sorted(widths.items())
        if width % LARGE_BLOCK
    ]


def compare(found: int, draft: Draft) -> str:
    """Return where a size is among those of llama.cpp's mixes, "" where their rules are not known."""
    try:
        sizes = sorted((draft.bytes_like(mix), mix) for mix in MIXES)
    except UsageError:
        return ""
    below = [f"{mix} ({size(taken)})" for taken, mix in sizes if taken < found]
    same = [mix for taken, mix in sizes if taken == found]
    above = [f"{mix} ({size(taken)})" for taken, mix in sizes if taken > found]
    made = "as llama.cpp would make it"
    if same:
        return f"that of {' and '.join(same)} {made}"
    if not below:
        return f"smaller than {above[0]} {made}, its smallest mix here"
    if not above:
        return f"larger than {below[-1]} {made}, its largest mix here"
    return f"between {below[-1]} and {above[0]} as llama.cpp would make them"
