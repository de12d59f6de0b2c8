"""The pass rotate: which linears get a rotation, that a rotated checkpoint computes what it says, what it wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantc
from quantc.formats import DENSE
from quantc.numerics.basis import Rounding
from quantc.numerics.hadamard import block_order, rotation
from quantc.numerics.statistics import Gram, output_energy
from quantc.passes import rotate
from quantc.passes.rotate import Rotate, RotateConfig, error_ratio
from quantc.pipeline.work import BlockWork
from quantc.recipe import Recipe
from quantc.spec import QuantSpec
from tests.families import VOCAB, build
from tests.helpers import block_works, in_memory_run, quantize_saved, save_with_tokenizer, thinned
from tests.outliers import OutlierLab
from tests.whole.test_families import TOKENS, put_rounded_weights

ROTATED = {"version": 1, "passes": [{"allocate": {"bits": 8, "group_size": 32}}, "rotate", "quantize"]}
FAMILIES = ["llama", "gpt2", "mixtral", "gemma3_text", "phi3"]


@pytest.mark.usefixtures("rotation_pays")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_checkpoint_has_the_logits_of_the_rounded_model(family: str, tmp_path: Path) -> None:
    model = build(family)
    save_with_tokenizer(model, tmp_path / "model")
    report = quantize_saved(tmp_path, recipe=Recipe.from_dict(ROTATED))
    assert report.linears
    assert all(linear.spec.hadamard == block_order(linear.shape[1]) for linear in report.linears)
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32, verify=True)
    with torch.no_grad():
        original = model(input_ids=TOKENS, use_cache=False).logits
        found = packed(input_ids=TOKENS, use_cache=False).logits
        put_rounded_weights(model, tmp_path / "packed")
        expected = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - original).norm() < 0.05 * original.norm()  # 8 bits: a wrong rotation would lose everything


@pytest.mark.usefixtures("rotation_pays")
def test_codes_belong_to_the_rotated_weight(tmp_path: Path) -> None:
    save_with_tokenizer(build("llama"), tmp_path / "model")
    quantize_saved(tmp_path, recipe=Recipe.from_dict(ROTATED))
    packed = quantc.load(tmp_path / "packed", dtype=torch.float32)
    linear = packed.model.layers[0].self_attn.q_proj
    source = build("llama").model.layers[0].self_attn.q_proj.weight
    turned = source.double() @ rotation(source.shape[1], linear.spec.hadamard)
    unpacked = linear.dequantize(torch.float64)
    assert (unpacked - source.double()).norm() < 0.01 * source.double().norm()
    stored = DENSE.unpack(linear.parts(), linear.spec, linear.matrix_shape).dequantize(torch.float64)
    assert (stored - turned).norm() < 0.01 * turned.norm()


# The choice


def planned_work(family: str, **spec: int) -> BlockWork:
    """The first block of a tiny model whose linears are all planned with a rotation."""
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    run = in_memory_run(build(family), **spec)
    Rotate(RotateConfig()).plan(run)
    return next(block_works(run, tokens))


def gram_of(width: int, loud: tuple[int, ...] = (), rows: int = 200) -> Gram:
    """Of random rows whose `loud` channels are 30 times as large as the others."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    x[:, list(loud)] *= 30
    gram = Gram(width)
    gram.add(x)
    return gram


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_ratio_is_that_of_the_errors_of_the_whole_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "SAMPLED_ROWS", 1000)  # all of them
    work = planned_work(family, bits=4, group_size=32)
    for item in work.block.activations:
        gram, readers = gram_of(item.width, (1, 9)), work.readers(item)
        lost = {}
        for order in (block_order(item.width), 0):
            basis = work.rounding.basis(gram.matrix, gram.rows, order, 3)
            turned = [(basis.turn(work.weight(linear)), work.run.plan.specs[linear.name]) for linear in readers]
            lost[bool(order)] = sum(
                output_energy(basis.round(weight, spec).dequantize() - weight, basis.gram)
                for weight, spec in turned
                if spec is not None
            )
        assert error_ratio(work, item, readers, [gram]) == pytest.approx(lost[True] / lost[False], rel=1e-4)


def test_experts_that_saw_too_little_have_no_say() -> None:
    work = planned_work("mixtral", bits=4, group_size=32)
    item = next(item for item in work.block.activations if work.experts(item) > 1)
    readers, empty = work.readers(item), Gram(item.width)
    grams = [empty] * work.experts(item)
    assert error_ratio(work, item, readers, grams) is None
    grams[1] = gram_of(item.width)
    alone = error_ratio(work, item, readers, grams)
    grams[0] = gram_of(item.width, (3,), rows=1)
    assert error_ratio(work, item, readers, grams) == alone


@pytest.mark.parametrize(
    ("ratio", "block", "why"),
    [
        (0.9, 64, "rotated: output error 0.9 times that without"),
        (1.0, 0, "not rotated: output error 1 times that without"),
        (1.25, 0, "not rotated: output error 1.25 times that without"),
        (None, 0, "not rotated: no output error to compare"),
    ],
)
def test_the_plan_says_what_was_measured(
    ratio: float | None, block: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotate, "error_ratio", lambda *_: ratio)
    work = planned_work("llama", bits=4, group_size=32)
    Rotate(RotateConfig()).build(work)
    plan = work.run.plan
    assert plan.why["model.layers.0.self_attn.k_proj"] == why
    assert plan.why.keys() == {linear.name for linear in work.block.quantized}
    assert plan.specs["model.layers.0.self_attn.k_proj"] == QuantSpec(4, 32, hadamard=block)


def test_the_report_counts_what_is_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate, "error_ratio", lambda _, item, *__: 1.1 if item.kind == "normed" else 0.9)
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    run = in_memory_run(build("llama"), bits=4, group_size=32)
    step = Rotate(RotateConfig())
    step.plan(run)
    for work in block_works(run, tokens):
        assert not run.report.notes
        step.build(work)
    assert run.report.notes == ["rotate left out 10 of 14 linears: rotated they lose more"]


def test_a_plan_that_was_handed_in_stays() -> None:
    run = in_memory_run(build("llama"), bits=4, group_size=32, hadamard=16)
    run.plan.given, before = True, dict(run.plan.specs)
    step = Rotate(RotateConfig())
    step.plan(run)
    assert not step.calibrated
    assert run.plan.specs == before
    assert run.report.notes == ["rotate put no online rotation into the given plan"]


@pytest.mark.parametrize("placement", ["online", "folded"])
def test_before_rounding_to_nearest_nothing_is_rotated(placement: Any) -> None:
    run = in_memory_run(build("llama"), bits=4, group_size=32)
    run.rounding, before = Rounding(feedback=False), dict(run.plan.specs)
    step = Rotate(RotateConfig(placement, placement))
    step.plan(run)
    assert not step.calibrated
    assert run.plan.specs == before
    assert run.report.notes == ["rotate was left out: a rotated model loses by rounding to nearest"]


# Outliers


# Measured, without, with every and with the measured rotations: 0.0354, 0.0038, 0.0038 at 4 bits; 0.1696, 0.1602,
# 0.0903 at 3; 1.79, 5.64, 1.79 at 2, on Zen 5. With AMX, and with AVX2 only, the measured ones give 0.2 and 0.4 % more
# than none at 2 bits: something stays that gains nothing. Why is not known.
@pytest.mark.parametrize(("bits", "most"), thinned([(3, 0.8), (4, 0.3)], every=2))
def test_a_rotation_stays_where_it_pays(lab: OutlierLab, bits: int, most: float) -> None:
    allocate = {"allocate": {"bits": bits, "group_size": 32}}
    assert lab.kl(allocate, "rotate", method="gptq") <= most * lab.kl(allocate, method="gptq")


def test_where_rotations_lose_nearly_none_of_it_is_lost(lab: OutlierLab, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = {"allocate": {"bits": 2, "group_size": 32}}
    none, measured = lab.kl(allocate, method="gptq"), lab.kl(allocate, "rotate", method="gptq")
    monkeypatch.setattr("quantc.passes.rotate.error_ratio", lambda *_: 0.5)
    every = lab.kl(allocate, {"rotate": {}}, method="gptq")
    assert measured - none <= 0.05 * (every - none)


@pytest.mark.slow
def test_rotation_recovers_most_of_what_the_outliers_cost_at_4_bits(lab: OutlierLab) -> None:
    allocate = {"allocate": {"bits": 4, "group_size": 32}}
    assert lab.recovery([allocate], [allocate, "rotate"], method="gptq") > 0.5  # measured: 0.92


def test_rounding_to_nearest_is_what_it_is_without(lab: OutlierLab) -> None:
    allocate = {"allocate": {"bits": 4, "group_size": 32}}
    assert lab.kl(allocate, "rotate", method="rtn") == lab.kl(allocate, method="rtn")


# Measured: 0.0065 scaled, 0.0033 scaled and rotated; at 2 bits 0.13 and 0.075. Rotations that are measured before
# scaling stay away where they would pay after it: 0.0050 and 0.12.
@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 2])
def test_scaled_first_nearly_every_rotation_pays(lab: OutlierLab, bits: int) -> None:
    allocate = {"allocate": {"bits": bits, "group_size": 32}}
    assert lab.kl(allocate, "scale", "rotate", method="gptq") < 0.8 * lab.kl(allocate, "scale", method="gptq")
