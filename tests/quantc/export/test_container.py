"""The size of a plan's GGUF file, known before anything is rounded, is that of the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import quantc
from quantc.errors import UsageError
from quantc.export.gguf.container import GgufContainer
from quantc.export.gguf.draft import Draft
from quantc.export.gguf.pre_tokenizers import WORDS_OF_BYTES
from quantc.frontend import open_model, to_meta
from quantc.graph.derive import derive
from quantc.pipeline.run import Run
from quantc.plan import Plan
from quantc.planning.head import table_shapes
from quantc.planning.targets import RUNTIMES, spec_of_code
from quantc.progress import LogProgress
from quantc.report import Report
from quantc.spec import QuantSpec
from tests.helpers import thinned
from tests.quantc.export.tiny import MODELS, build
from tests.quantc.export.tiny_tokenizers import byte_level

gguf = pytest.importorskip("gguf")
TARGET = RUNTIMES["gguf"]


def save(name: str, folder: Path, dtype: torch.dtype, **settings: object) -> Path:
    words = byte_level((WORDS_OF_BYTES,), False)
    build(name, vocab_size=len(words), **settings).to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def opened(model: Path) -> tuple[Run, GgufContainer]:
    source = open_model(model)
    run = Run(source, derive(source.model, source.load, to_meta), Plan(), Report("", ""), LogProgress())
    return run, GgufContainer(Draft.of(source), run)


def mixed(run: Run, seed: int) -> dict[str, QuantSpec | None]:
    """A plan of every type that fits, and of some weights left as they are."""
    shapes = {name: linear.shape for name, linear in run.graph.linears.items()} | table_shapes(run)
    draw = random.Random(seed)
    return {name: draw.choice([*TARGET.candidates(shape), None]) for name, shape in shapes.items()}


def check_size(model: Path, out: Path, seed: int) -> None:
    run, container = opened(model)
    specs = mixed(run, seed)
    plan = out.with_suffix(".yaml")
    Plan(specs).write(plan)
    quantc.quantize(model, plan=plan, method="rtn", calib="none", out=out)
    assert container.file_bytes(specs) == out.stat().st_size
    assert container.types(specs) == {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}


@pytest.mark.parametrize("name", thinned(sorted(MODELS), 3))
def test_sizes_of_plans_are_those_of_files(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path / "model", torch.bfloat16)
    check_size(model, tmp_path / "a.gguf", seed=1)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_counts_unless_it_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    model = save("llama", tmp_path / "model", torch.float16, tie_word_embeddings=tied)
    check_size(model, tmp_path / "a.gguf", seed=2)


def test_rows_of_256_have_types_of_large_blocks(tmp_path: Path) -> None:
    model = save("qwen2", tmp_path / "model", torch.float32, hidden_size=256, intermediate_size=512)
    check_size(model, tmp_path / "a.gguf", seed=3)


def test_a_gguf_source_keeps_its_metadata_and_what_is_not_packed(tmp_path: Path) -> None:
    model = save("mistral", tmp_path / "model", torch.float16)
    quantc.quantize(model, bits=8, method="rtn", calib="none", head_bits="keep", out=tmp_path / "source.gguf")
    check_size(tmp_path / "source.gguf", tmp_path / "a.gguf", seed=4)


def test_tensors_are_filled_up(tmp_path: Path) -> None:
    """An odd vocabulary of blocks of 34 bytes ends between two multiples of 32."""
    run, container = opened(save("llama", tmp_path / "model", torch.float32))
    name, shape = next(iter(table_shapes(run).items()))
    spec = TARGET.of_width(8, shape)
    assert spec is not None
    assert container.tensor_bits(name, spec) == 8 * 32 * -(-spec.stored_bits(shape) // (8 * 32))
    assert container.tensor_bits(name, spec) > spec.stored_bits(shape)


def test_what_no_block_holds_is_named_before_any_work(tmp_path: Path) -> None:
    run, container = opened(save("llama", tmp_path / "model", torch.float32))
    first = next(iter(run.graph.linears))
    with pytest.raises(UsageError, match=f"GGUF cannot hold {first}: it has asymmetric codes of 3 bits"):
        container.check({first: QuantSpec(3, 32)})


def test_inputs_are_rounded_in_blocks_as_large_as_those_of_the_weights(tmp_path: Path) -> None:
    """Also those of weights that stay as they are in a file; of floats they are not rounded."""
    model = save("qwen2", tmp_path / "model", torch.float16, hidden_size=256, intermediate_size=512)
    run, container = opened(model)
    names = list(run.graph.linears)
    codes = ("q4_k", "q5_0", "mxfp4")
    specs = {name: spec_of_code(code) for name, code in zip(names, codes, strict=False)}
    blocks = {name: container.input_block(name, specs.get(name)) for name in names}
    assert blocks == {**dict.fromkeys(names, 0), **dict(zip(names, (256, 32, 32), strict=False))}
    assert container.input_blocks == (32, 256)
    Plan({**dict.fromkeys(names), **specs}).write(tmp_path / "plan.yaml")
    quantc.quantize(model, plan=tmp_path / "plan.yaml", method="rtn", calib="none", out=tmp_path / "a.gguf")
    _, again = opened(tmp_path / "a.gguf")
    assert {name: again.input_block(name, None) for name in names} == blocks
