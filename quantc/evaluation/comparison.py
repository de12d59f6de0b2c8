"""What a comparison found: a record for each model, and the tables that the terminal and the page show."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import printable
from ..units import number, plural, size

PACKED, FLOATS, DEQUANTIZED = "packed weights", "float weights", "dequantized weights"
LLAMA_CPP = "llama.cpp"
HEADS = ("model", "size", "bits", "perplexity", "KL divergence", "p99", "top-1", "tokens/s", "computed with")
WORDS = {"model", "computed with", "block"}  # columns that hold no figures

Table = tuple[list[str], list[list[str]]]  # heads and rows


@dataclass(frozen=True)
class Compared:
    """What was measured of one model; the divergence from the first model is None for the first itself.

    runs_on: packed, float or dequantized weights. weights_bytes: size of the weight files. bits_per_weight: all that is
    stored for the linears in the blocks. speed_by: "llama.cpp" where that has decoded, else "". block_errors: of every
    block's output, relative to the first model's; None where they were not measured or cannot be compared.
    """

    model: str
    runs_on: str
    weights_bytes: int
    bits_per_weight: float
    perplexity: float
    mean_kl: float | None
    p99_kl: float | None
    top1_agreement: float | None
    tokens_per_second: float
    speed_by: str
    block_errors: list[float] | None = None


@dataclass
class Comparison:
    """Models beside the first of them. block_names: the first model's, where errors by block were measured."""

    models: list[Compared]
    text: str
    positions: int
    windows: int
    dtype: str
    dtype_reason: str
    block_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    page: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def has_block_errors(self) -> bool:
        """Whether the blocks of any model were compared."""
        return any(model.block_errors is not None for model in self.models)

    @property
    def labels(self) -> list[str]:
        """The models' names: the last part of each path where these differ."""
        names = [printable(model.model) for model in self.models]
        short = [Path(name).name or name for name in names]
        return short if len(set(short)) == len(short) else names

    def table(self) -> Table:
        """Return heads and rows of the table of models."""
        return list(HEADS), [_row(model) for model in self.models]

    def block_table(self) -> Table:
        """Return heads and rows of the table of blocks: the error of each in every model that has them."""
        shown = [(label, each.block_errors) for label, each in zip(self.labels, self.models, strict=True)]
        compared = [(label, errors) for label, errors in shown if errors is not None]
        rows = [
            [printable(name), *(number(errors[at]) for _, errors in compared)]
            for at, name in enumerate(self.block_names or ())
        ]
        return ["block", *(label for label, _ in compared)], rows

    def explained(self) -> str:
        """Return a sentence or two on what the figures are."""
        reason = f" ({self.dtype_reason})" if self.dtype_reason else ""
        read = f"{self.positions:,} predictions in {plural(self.windows, 'window')} of {printable(self.text)}"
        return (
            f"{read}, computed in {self.dtype}{reason}. KL divergence is from {printable(self.models[0].model)}, in "
            "nats per token: mean, and 99th percentile. Bits are all that is stored for a weight in the blocks."
        )


def _row(model: Compared) -> list[str]:
    divergence = ["", "", ""]
    if model.mean_kl is not None and model.p99_kl is not None and model.top1_agreement is not None:
        divergence = [number(model.mean_kl), number(model.p99_kl), f"{number(100 * model.top1_agreement)} %"]
    return [
        printable(model.model),
        size(model.weights_bytes),
        number(model.bits_per_weight),
        number(model.perplexity, 4),
        *divergence,
        number(model.tokens_per_second),
        model.runs_on + (f"; speed of {model.speed_by}" if model.speed_by else ""),
    ]
