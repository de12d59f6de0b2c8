"""Types that llama.cpp's quantizer would give tensors are those that it gave them."""

from __future__ import annotations

import json

import pytest

from quantc.errors import UsageError
from quantc.export.gguf.metadata import Described
from quantc.export.gguf.mixes import MIXES, check_mix, mixed
from tests.quantc.export.mix_models import CASES, FILE, layout, spell

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_types_are_those_that_llama_cpp_has_chosen(case: str) -> None:
    tensors, described = layout(case)
    found = {mix: spell({tensor.name: tensor.type_name for tensor in mixed(tensors, described, mix)}) for mix in MIXES}
    assert found == RECORDED[case]


def test_an_architecture_of_other_rules_is_refused() -> None:
    with pytest.raises(UsageError, match="other rules for falcon than for the rest"):
        mixed([], Described("falcon", {}), "Q4_K_M")


def test_an_unknown_mix_is_refused_with_the_known_ones() -> None:
    assert check_mix("q4_k_m") == "Q4_K_M"
    with pytest.raises(UsageError, match="--like is Q4_K_X, which is no mix that quantc knows; choose Q8_0, Q6_K,"):
        check_mix("Q4_K_X")
