"""An embedding whose rows are read when tokens look them up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import quantc
from quantc.calibration.stream import CalibrationRun
from quantc.errors import ModelError
from quantc.frontend import open_model, to_meta
from quantc.frontend.on_demand import OnDemand
from quantc.graph.derive import derive
from tests.quantc.frontend.tiny_gguf import VOCABULARY, tensors, write

VALUES = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


class Reads:
    """A table that counts how it is read."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.whole = 0
        self.parameter = nn.Parameter(OnDemand.of((50, 6), self._rows, self._whole), requires_grad=False)

    def _rows(self, numbers: torch.Tensor) -> torch.Tensor:
        self.rows.append(numbers.tolist())
        return VALUES[numbers]

    def _whole(self) -> torch.Tensor:
        self.whole += 1
        return VALUES.clone()


def test_an_embedding_reads_each_row_once_that_it_looks_up() -> None:
    reads, embedding = Reads(), nn.Embedding(50, 6, device="meta")
    embedding._parameters["weight"] = reads.parameter
    indices = torch.tensor([[7, 3, 7], [49, 0, 3]])
    assert torch.equal(embedding(indices), VALUES[indices])
    assert reads.rows == [[0, 3, 7, 49]]
    assert (reads.parameter.shape, reads.parameter.nbytes, reads.parameter.is_meta) == ((50, 6), 50 * 6 * 4, False)
    to_meta(embedding)
    assert embedding.weight.is_meta
    assert reads.whole == 0


def test_anything_else_reads_the_table_whole_and_once() -> None:
    reads = Reads()
    hidden = torch.randn(2, 6, requires_grad=True)
    logits = F.linear(hidden, reads.parameter)
    assert torch.equal(logits, F.linear(hidden, VALUES))
    logits.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(hidden.grad, VALUES.sum(0).expand(2, 6), atol=1e-5)  # type: ignore[arg-type]
    assert torch.equal(reads.parameter.detach().to(torch.float16), VALUES.half())
    assert torch.equal(F.embedding(torch.tensor([4]), reads.parameter), VALUES[[4]])
    assert (reads.whole, reads.rows) == (1, [])


def test_a_model_on_tokens_reads_rows_and_states_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "tiny.gguf", tensors(head=False))
    tokens = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for large in (0, 1 << 30):
        monkeypatch.setattr("quantc.frontend.gguf.LARGE", large)
        source = open_model(tmp_path / "tiny.gguf")
        graph = derive(source.model, source.load_for_tokens, to_meta)
        assert isinstance(source.model.get_input_embeddings().weight, OnDemand) == (large == 0)
        assert source.model.get_output_embeddings().weight is source.model.get_input_embeddings().weight
        states = CalibrationRun(source.model, graph, tokens, torch.device("cpu")).states()
        found.append(torch.cat([hidden for _, hidden in states]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("head_bits", [8, "keep"])
@pytest.mark.parametrize("head", [True, False])
def test_checkpoints_are_the_same(
    head: bool, head_bits: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "tiny.gguf", tensors(head))
    made = []
    for large in (0, 1 << 30):
        monkeypatch.setattr("quantc.frontend.gguf.LARGE", large)
        monkeypatch.setattr("quantc.numerics.strips.STRIP", 96 if large == 0 else 1 << 20)
        out = tmp_path / str(large)
        quantc.quantize(tmp_path / "tiny.gguf", bits=4, group_size=8, method="rtn", head_bits=head_bits, out=out)
        made.append(load_file(next(out.glob("*.safetensors"))))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("large", [0, 1 << 30])
@pytest.mark.parametrize("name", ["token_embd.weight", "output.weight"])
def test_non_finite_tables(name: str, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantc.frontend.gguf.LARGE", large)
    monkeypatch.setattr("quantc.numerics.strips.STRIP", 96)
    found = tensors()
    found[name][[2, 30], 5] = float("nan")
    write(tmp_path / "tiny.gguf", found)
    with pytest.raises(ModelError) as caught:
        quantc.quantize(tmp_path / "tiny.gguf", bits=4, group_size=8, method="rtn", out=tmp_path / "out")
    stored = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}[name]
    assert str(caught.value) == (
        f"{tmp_path / 'tiny.gguf'}: 2 of 1280 values of {stored} are NaN or infinite; quantization needs finite "
        "weights, so repair or fetch the model again."
    )
    assert not (tmp_path / "out").exists()
