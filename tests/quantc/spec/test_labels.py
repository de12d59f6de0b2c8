"""Labels and specs: one says the other, and what is no label is None."""

from __future__ import annotations

import pytest

from quantc.spec import QuantSpec, spec_of_label


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, 128),
        QuantSpec(3, 64, "per_ic", True),
        QuantSpec(8, -1, symmetric=True),
        QuantSpec(4, 64, code="nf4"),
        QuantSpec(4, 5, "per_ic", code="nf4_dq"),
        QuantSpec(8, -1, code="fp8"),
        QuantSpec(4, 32, code="mxfp4"),
        QuantSpec(4, 16, code="nvfp4"),
        QuantSpec(4, 256, code="iq4_xs"),
        QuantSpec(2, 256, code="q2_k"),
        QuantSpec(1, -1, code="trellis"),
        QuantSpec(4, -1, code="trellis"),
    ],
    ids=QuantSpec.label,
)
def test_a_label_is_that_of_the_spec_it_gives(spec: QuantSpec) -> None:
    assert spec_of_label(spec.label()) == spec


def test_codes_have_a_usual_group() -> None:
    assert spec_of_label("nf4") == QuantSpec(4, 64, code="nf4")
    assert spec_of_label("nf4_dq-per_ic") == QuantSpec(4, 64, "per_ic", code="nf4_dq")
    assert spec_of_label("fp8") == QuantSpec(8, -1, code="fp8")


@pytest.mark.parametrize(
    "label",
    ["", "w4", "w9g64", "w4g0", "w4g64-s50", "w4g64-had", "w4g64sym-wide8", "nf5", "mxfp4-g64", "nf4-64", "uniform",
     "mxfp4-per_ic", "w4g64-nope", "w4g99999999999", "w4g64 ", "W4G64", "trellis", "trellis6",
     "trellis3-per_ic", "w3g64-trellis"],
)  # fmt: skip
def test_other_text_is_no_label(label: str) -> None:
    assert spec_of_label(label) is None
