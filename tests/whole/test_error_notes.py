"""Notes of a run on linears that lost far more than others of their kind."""

from __future__ import annotations

from quantc.report import LinearReport, notes_on_errors
from quantc.spec import QuantSpec


def linear(name: str, error: float, bits: int = 4, lost_rows: int = 0) -> LinearReport:
    return LinearReport(name, QuantSpec(bits), (8, 8), 0, 4.5, error, "gptq", lost_rows=lost_rows)


def ordinary(kind: str, error: float, bits: int = 4) -> list[LinearReport]:
    return [linear(f"layers.{block}.{kind}", error * (1 + 0.1 * block), bits) for block in range(9)]


def test_usual_errors_get_no_note() -> None:
    assert notes_on_errors([]) == []
    linears = [*ordinary("q_proj", 0.01), *ordinary("v_proj", 0.15, bits=2), *ordinary("o_proj", 1e-5, bits=8)]
    # Ten times as much as others, but next to nothing.
    assert notes_on_errors([*linears, linear("layers.9.o_proj", 5e-3, bits=8)]) == []


def test_a_linear_far_above_its_kind_is_named() -> None:
    linears = [*ordinary("q_proj", 0.001), linear("layers.9.q_proj", 0.05), *ordinary("v_proj", 0.04)]
    assert notes_on_errors(linears) == [
        "rounding takes far more of the output of 1 linear than is usual at these bits: layers.9.q_proj 5%; give them "
        "more bits or smaller groups, or keep them (--pin NAME=16)"
    ]


def test_kinds_are_compared_at_the_same_bits() -> None:
    assert notes_on_errors([*ordinary("q_proj", 1e-4, bits=8), linear("layers.9.q_proj", 0.2, bits=2)]) == []


def test_what_loses_most_of_its_output_is_named_even_where_all_do() -> None:
    linears = [linear(f"layers.{block}.q_proj", 0.9 + 0.01 * block) for block in range(5)]
    (note,) = notes_on_errors(linears)
    assert note.startswith("rounding takes far more of the output of 5 linears than is usual at these bits: ")
    assert "layers.4.q_proj 94%, layers.3.q_proj 93%, layers.2.q_proj 92% and 2 more; " in note
    assert notes_on_errors([linear("layers.0.q_proj", 0.9, bits=2)]) == []  # at 2 bits that happens


def test_an_error_that_is_no_number_is_named() -> None:
    (note,) = notes_on_errors([*ordinary("q_proj", 0.01), linear("layers.9.q_proj", float("nan"))])
    assert "layers.9.q_proj nan%" in note


def test_rows_out_of_range_are_counted_together() -> None:
    linears = [linear("layers.0.q_proj", 0.01, lost_rows=2), linear("layers.1.q_proj", 0.01, lost_rows=3)]
    assert notes_on_errors(linears) == [
        "layers.0.q_proj and 1 more linear: 5 rows of weights too small or too large for float16 scales; where they "
        "matter, keep it (--pin NAME=16)"
    ]
